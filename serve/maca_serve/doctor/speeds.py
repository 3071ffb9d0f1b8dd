"""Kernels that were measured to be no faster than 16 bits, on a machine of this kind.

The measurements are `assets/kernel_speeds.json`, which `benchmarks/serving.py --publish` writes
from its result files: a list of {"kernel", "machine", "like", "model", "tokens", "ratios" of output
tokens per second by load in words, "source"}. `like` is what a machine of this kind has, see
`kind`.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from maca_serve.doctor.checks import Problem
from maca_serve.speed.breakeven import MARGIN

FILE = "assets/kernel_speeds.json"


@cache
def read_speeds() -> list[dict[str, Any]]:
    """What was measured."""
    return list(json.loads(files("maca_serve").joinpath(FILE).read_text(encoding="utf-8")))


def kind(machine: dict[str, Any]) -> list[str]:
    """What decides how fast its kernels are: its cards, else its CPU's instruction sets."""
    return list(machine["gpus"] or machine["cpu_flags"])


def no_faster(kernel: str, machine: dict[str, Any], layer: str) -> Problem | None:
    """A note on a kernel that was no faster than 16 bits at some load, None where none is known.

    Args:
        kernel: the kernel's class name.
        machine: the one at hand, see `maca_serve.common.machine.describe_machine`.
        layer: where it would run.
    """
    for found in read_speeds():
        alike = found["kernel"] == kernel and found["like"] == kind(machine)
        if alike and min(found["ratios"].values()) < 1 + MARGIN:
            what = (
                f"{kernel} was {_in_words(found['ratios'])} (output tokens per second of"
                f" {found['model']}, {found['tokens']} out, on {found['machine']}:"
                f" {found['source']})"
            )
            return Problem("note", what, "measure it here: maca-serve throughput BASE DIR", [layer])
    return None


def _in_words(ratios: dict[str, float]) -> str:
    """`slower than BF16 where it was measured: 0.90x with 1 in flight, 0.54x with 16 in flight`."""
    best, worst = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    word = "no faster"
    if ratios[best] < 1 - MARGIN:
        word = "slower"
    if ratios[best] >= 1 + MARGIN:
        word = "not always faster"
    ends = [f"{ratios[load]:.2f}x with {load}" for load in dict.fromkeys((best, worst))]
    return f"{word} than BF16 where it was measured: {', '.join(ends)}"
