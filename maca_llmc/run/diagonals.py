"""What each input length sees: the Hessian's diagonal of a few modules, kept per length."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

DIAGONALS_FILE = "maca_diagonals.json"


class DiagonalRecorder:
    """Mean squared input per channel and per sequence length, for a few modules.

    This is the diagonal of the per-sequence-normalised Hessian, one for each length: what the
    paper's Figure 1 compares.

    :param modules: names of the modules to keep
    :param scales: lengths to keep apart; a sequence counts under the first that is not shorter,
        one longer than all under the last
    """

    def __init__(self, modules: Iterable[str], scales: Sequence[int]) -> None:
        self.modules = frozenset(modules)
        self.scales = sorted(scales)
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: dict[tuple[str, int], int] = defaultdict(int)

    def add(self, name: str, sequence: torch.Tensor) -> None:
        """Take in one sequence of a module's inputs, ``[length, d]``; others are passed over."""
        if name not in self.modules:
            return
        length = sequence.shape[0]
        key = (name, next((scale for scale in self.scales if length <= scale), self.scales[-1]))
        diagonal = sequence.float().square().mean(dim=0).cpu()
        self._sums[key] = self._sums[key] + diagonal if key in self._sums else diagonal
        self._counts[key] += 1

    def diagonals(self) -> dict[str, dict[int, torch.Tensor]]:
        """Per module and per length, the mean over its sequences, ``[d]``."""
        result: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        for (name, length), total in sorted(self._sums.items()):
            result[name][length] = total / self._counts[name, length]
        return dict(result)

    def progress(self) -> list[Any]:
        """What was seen so far; JSON-able, exact."""
        return [
            [name, length, self._counts[name, length], total.tolist()]
            for (name, length), total in self._sums.items()
        ]

    def restore_progress(self, progress: list[Any]) -> None:
        """Take over what :meth:`progress` said in a run that was killed."""
        for name, length, count, total in progress:
            self._sums[name, length] = torch.tensor(total)
            self._counts[name, length] = count

    def save(self, folder: Path) -> None:
        """Write ``maca_diagonals.json`` to ``folder`` (nothing when nothing was seen)."""
        diagonals = self.diagonals()
        if not diagonals:
            return
        record = {
            "lengths": sorted({length for _, length in self._sums}),
            "modules": {
                name: {
                    str(length): [float(f"{value:.5g}") for value in diagonal.tolist()]
                    for length, diagonal in by_length.items()
                }
                for name, by_length in diagonals.items()
            },
        }
        (folder / DIAGONALS_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")


def inspected_modules(names: list[str]) -> list[str]:
    """A few modules worth looking at: attention and MLP inputs of a first, middle and last layer.

    :param names: names of all quantized modules
    """
    layers = sorted({int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))})
    if not layers:
        return names[:3]
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
    kinds = ("q_proj", "o_proj", "down_proj")
    return [
        name
        for name in names
        if name.endswith(kinds)
        and (match := re.search(r"\.(\d+)\.", name))
        and int(match[1]) in chosen
    ]
