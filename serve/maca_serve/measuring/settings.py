"""What is measured, and the defaults of every command."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.evaluation.tasks import CONTINUATION
from maca_serve.speed.loads import PEAK_SHARES, Load

AUTO = "auto"
# Arrivals of a rate are measured for about this long, with at least so many requests.
RATE_SECONDS, RATE_PROMPTS = 20, 8
SEED = 0


@dataclass(frozen=True)
class AccuracySettings:
    """Perplexity by length and multiple choice.

    On two cores vLLM scores some 700 tokens of a 135M model a second: with the defaults, a
    checkpoint takes less than two minutes, of which the start of the engine is almost one.

    Attributes:
        text: evaluation text, .txt or .jsonl; the package's sample when None.
        lengths: increasing input lengths in tokens; `context` is the model's.
        windows: target blocks of 32 tokens, the same under every length.
        tasks: JSONL files, `continuation`, `needle`, `copy`, `usual`, or lm-eval task names.
        limit: at most this many questions of each task.
        seed: of draws of questions and wrong choices.
    """

    text: str | Path | None = None
    lengths: Sequence[int | str] = (64, 256, 1024)
    windows: int = 12
    tasks: Sequence[str] = (CONTINUATION,)
    limit: int = 32
    seed: int = SEED

    def __post_init__(self) -> None:
        """Raise UserError for a limit without a standard error."""
        if self.limit < 2:
            raise UserError(f"--limit: {self.limit} gives no standard error; use at least 2")


@dataclass(frozen=True)
class SpeedSettings:
    """Latency and throughput by vLLM's own benchmark; lists of loads are put in order.

    Attributes:
        concurrency: requests in flight, one run for each.
        input_len: random prompt tokens of a request, every concurrency for each.
        output_len: output tokens of a request, end-of-text ignored.
        prompts: requests of a run; when None, two for each in flight, or RATE_SECONDS of
            arrivals, at least RATE_PROMPTS.
        rates: requests per second, one run for each; AUTO for shares of what the first checkpoint
            reached; none when empty.
        repeats: runs of every checkpoint under every load, in alternating order.
        seed: of the prompts and of their arrivals.
    """

    concurrency: Sequence[int] = (1, 4)
    input_len: Sequence[int] = (128,)
    output_len: int = 32
    prompts: int | None = None
    rates: Sequence[float] | str = ()
    repeats: int = 2
    seed: int = SEED

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are not positive, or an empty or repeated list."""
        for option, number in {"--prompts": self.prompts, "--repeats": self.repeats}.items():
            if number is not None and number < 1:
                raise UserError(f"{option}: {number} is not positive")
        if self.output_len < 2:
            raise UserError(f"--output-len: {self.output_len} has no time per output token; use 2")
        _check_list("--concurrency", self.concurrency, "1,4")
        _check_list("--input-len", self.input_len, "32,512")
        lists = ["concurrency", "input_len"]
        if isinstance(self.rates, str):
            if self.rates != AUTO:
                raise UserError(f"--rates: {self.rates!r} is not {AUTO}, nor numbers like 0.5,1")
        else:
            if self.rates:
                _check_list("--rates", self.rates, "0.5,1,2")
            lists.append("rates")
        for name in lists:
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(self.input_len) + self.output_len

    @property
    def closed_loads(self) -> list[Load]:
        """Every concurrency at every prompt length."""
        return [Load(n, concurrency=c) for n in self.input_len for c in self.concurrency]

    @property
    def count(self) -> int:
        """Loads, those by rate included."""
        rates = len(PEAK_SHARES) if self.rates == AUTO else len(self.rates)
        return len(self.input_len) * (len(self.concurrency) + rates)

    def describe(self) -> dict[str, Any]:
        """The settings as they go into results."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def prompts_under(self, load: Load) -> int:
        """Requests of a run."""
        if self.prompts:
            return self.prompts
        if load.rate is not None:
            return max(RATE_PROMPTS, math.ceil(RATE_SECONDS * load.rate))
        assert load.concurrency is not None
        return 2 * load.concurrency


def _check_list(option: str, numbers: Sequence[float], example: str) -> None:
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise UserError(f"{option}: give positive numbers, e.g. {example}")
    if len(set(numbers)) != len(numbers):
        raise UserError(f"{option}: a number stands twice")
