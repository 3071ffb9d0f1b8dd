"""In which order engines run, so that a machine that slows down slows all checkpoints down alike.

Of two checkpoints A and B the runs are A B B A: whatever drifts evenly cancels in their ratio.
Where all engines fit into memory together they all stay up, and every load is alternated by
itself; an idle engine takes about 1.5 % of one core (vLLM 0.32 on a CPU). Where they do not, each
visit to a checkpoint runs all loads, and the order of visits is A B B A, the two of B in one.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from maca_llmc.common.memory import available_memory
from maca_serve.engine.fit import GIB, Fit, memory_needed
from maca_serve.formats.checkpoint import Checkpoint

# Of the process that runs vLLM's benchmark.
BENCHMARK_BYTES = 1 * GIB


@dataclass(frozen=True)
class Visit:
    """Engines that are up at the same time.

    Attributes:
        checkpoints: their places.
        rounds: the rounds of runs they do; none where nothing is timed.
    """

    checkpoints: tuple[int, ...]
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """Visits, one after another.

    Attributes:
        together: whether all engines are up at once.
        why: in words, with the memory it was decided by.
        visits: every checkpoint is in one at least.
    """

    together: bool
    why: str
    visits: list[Visit]

    @property
    def starts(self) -> int:
        """How many times an engine is started."""
        return sum(len(visit.checkpoints) for visit in self.visits)

    def describe(self, names: list[str], repeats: int) -> dict[str, Any]:
        """As it goes into results: `order` is that of the runs under each load."""
        return {
            "engines": "together" if self.together else "one at a time",
            "why": self.why,
            "starts": self.starts,
            "order": [names[i] for n in range(repeats) for i in in_turn(range(len(names)), n)],
        }


def in_turn(places: Any, number: int) -> list[Any]:
    """Forwards in even rounds, backwards in odd ones."""
    return list(places) if number % 2 == 0 else list(places)[::-1]


def schedule(
    checkpoints: list[Checkpoint], fits: list[Fit], vllm_version: str, repeats: int
) -> Schedule:
    """Decide which engines are up when.

    Args:
        checkpoints: all of them.
        fits: their settings.
        vllm_version: of the installed vLLM; one with `cpu` in it is a CPU build.
        repeats: runs of every checkpoint under every load; 0 where nothing is timed.
    """
    places = range(len(checkpoints))
    if not repeats:
        return Schedule(False, "nothing is timed", [Visit((i,), ()) for i in places])
    if len(checkpoints) == 1:
        return Schedule(False, "there is one", [Visit((0,), tuple(range(repeats)))])
    if "cpu" not in vllm_version:
        why = "vLLM takes most of a card's memory for one engine"
        return Schedule(False, why, _blocks(places, repeats))
    needed = BENCHMARK_BYTES + sum(map(memory_needed, checkpoints, fits))
    free = available_memory()
    together = needed <= free
    why = f"they need {needed / GIB:.1f} GiB together, {free / GIB:.1f} GiB are free"
    visits = [Visit(tuple(places), tuple(range(repeats)))] if together else _blocks(places, repeats)
    return Schedule(together, why, visits)


def _blocks(places: range, repeats: int) -> list[Visit]:
    turns = [(i, number) for number in range(repeats) for i in in_turn(places, number)]
    return [
        Visit((place,), tuple(number for _, number in group))
        for place, group in groupby(turns, key=lambda turn: turn[0])
    ]
