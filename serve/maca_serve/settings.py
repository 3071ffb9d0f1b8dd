"""What is measured, and the defaults of every command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maca_serve.errors import UserError
from maca_serve.tasks import CONTINUATION

# On two cores vLLM scores some 700 tokens of a 135M model a second: with these, a checkpoint
# takes less than two minutes, of which the start of the engine is almost one.
LENGTHS = (64, 256, 1024)
WINDOWS = 12
LIMIT = 32
CONCURRENCY = (1, 4)
INPUT_LEN = 128
OUTPUT_LEN = 32
SEED = 0


@dataclass(frozen=True)
class AccuracySettings:
    """Perplexity by length and multiple choice.

    Attributes:
        text: evaluation text, .txt or .jsonl; the package's sample when None.
        lengths: increasing input lengths in tokens; `context` is the model's.
        windows: target blocks of 32 tokens, the same under every length.
        tasks: JSONL files, `continuation`, `needle`, `copy`, `usual`, or lm-eval task names.
        limit: at most this many questions of each task.
        seed: of draws of questions and wrong choices.
    """

    text: Path | None = None
    lengths: tuple[int | str, ...] = LENGTHS
    windows: int = WINDOWS
    tasks: tuple[str, ...] = (CONTINUATION,)
    limit: int = LIMIT
    seed: int = SEED

    def __post_init__(self) -> None:
        """Raise UserError for a limit without a standard error."""
        if self.limit < 2:
            raise UserError(f"--limit: {self.limit} gives no standard error; use at least 2")


@dataclass(frozen=True)
class SpeedSettings:
    """Latency and throughput by vLLM's own benchmark.

    Attributes:
        concurrency: requests in flight, one run for each.
        input_len: random prompt tokens of a request.
        output_len: output tokens of a request, end-of-text ignored.
        prompts: requests of a run; two for each in flight, at least 4, when None.
        seed: of the prompts.
    """

    concurrency: tuple[int, ...] = CONCURRENCY
    input_len: int = INPUT_LEN
    output_len: int = OUTPUT_LEN
    prompts: int | None = None
    seed: int = SEED

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are not positive, or an empty or repeated list."""
        numbers = {"--input-len": self.input_len, "--prompts": self.prompts}
        for option, number in numbers.items():
            if number is not None and number < 1:
                raise UserError(f"{option}: {number} is not positive")
        if self.output_len < 2:
            raise UserError(f"--output-len: {self.output_len} has no time per output token; use 2")
        if not self.concurrency or min(self.concurrency) < 1:
            raise UserError("--concurrency: give positive numbers, e.g. 1,4")
        if len(set(self.concurrency)) != len(self.concurrency):
            raise UserError("--concurrency: a number stands twice")

    def describe(self) -> dict[str, Any]:
        """The settings as they go into results."""
        return {**vars(self), "concurrency": list(self.concurrency)}

    def prompts_at(self, concurrency: int) -> int:
        """Requests of the run with that many in flight."""
        return self.prompts or max(4, 2 * concurrency)
