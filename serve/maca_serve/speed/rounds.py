"""Time running engines in turn, and keep what came out by checkpoint and load."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from maca_serve.common.console import progress
from maca_serve.engine.engine import Engine
from maca_serve.measuring.settings import AUTO
from maca_serve.speed.alternation import in_turn
from maca_serve.speed.bench import Benchmark, combine
from maca_serve.speed.loads import Load, rates_of_peak

Run = dict[str, Any]


class Timing:
    """Runs of all checkpoints under all loads.

    Attributes:
        benchmark: what runs them.
        first: name of the checkpoint whose peak sets the rates, where they are AUTO; it must be
            the first to be timed.
    """

    def __init__(self, benchmark: Benchmark, first: str) -> None:
        """Start with no runs."""
        self.benchmark = benchmark
        self.first = first
        self._runs: dict[str, dict[Load, list[Run]]] = {}
        self._seconds: dict[str, float] = {}
        self._rates: dict[int, list[float]] = {}

    def run(self, engines: Sequence[Engine], rounds: Sequence[int]) -> None:
        """Time engines strictly one after another, every load in all rounds before the next.

        Args:
            engines: running.
            rounds: their numbers; odd ones run the engines backwards.

        Raises:
            EngineError, RequestError: see `Benchmark.run`.
        """
        settings = self.benchmark.settings
        with progress() as bar:
            total = settings.count * len(rounds) * len(engines)
            task = bar.add_task("timing", total=total, note="")
            for load in self._loads():
                for engine in (e for number in rounds for e in in_turn(engines, number)):
                    bar.update(task, note=f"{engine.checkpoint.name}: {load}")
                    self._one(engine, load)
                    bar.update(task, advance=1)

    def __contains__(self, name: str) -> bool:
        """Whether a checkpoint has been timed under some load at least."""
        return name in self._runs

    def results(self, name: str) -> dict[str, Any]:
        """`throughput` by prompt length and requests in flight, `rates` by length and rate.

        `rates` is there only where rates were asked for; for a run see `combine`.
        """
        found: dict[str, Any] = {"throughput": {}}
        for load, runs in self._runs[name].items():
            part = found.setdefault("throughput" if load.rate is None else "rates", {})
            part.setdefault(str(load.input_len), {})[load.level] = combine(runs)
        return found

    def seconds(self, name: str) -> float:
        """Wall time of a checkpoint's runs."""
        return self._seconds[name]

    def _one(self, engine: Engine, load: Load) -> None:
        name, began = engine.checkpoint.name, time.monotonic()
        run = self.benchmark.run(engine, load)
        self._runs.setdefault(name, {}).setdefault(load, []).append(run)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def _loads(self) -> Iterator[Load]:
        """Rates come last: the first checkpoint's peak may have to be known."""
        settings = self.benchmark.settings
        yield from settings.closed_loads
        for length in settings.input_len if settings.rates else ():
            for rate in self._rates_at(length):
                yield Load(length, rate=rate)

    def _rates_at(self, length: int) -> list[float]:
        rates = self.benchmark.settings.rates
        if rates != AUTO:
            return [float(rate) for rate in rates]
        if length not in self._rates:  # once: all checkpoints get the same
            runs = self._runs[self.first]
            peak = max(runs[load][0]["requests_per_s"] for load in runs if load.input_len == length)
            self._rates[length] = rates_of_peak(peak)
        return self._rates[length]
