"""Parts of a model that must have one scheme, and what each takes under which scheme."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

from maca_llmc.recipe.targets import EXPERTS, FUSED, linear_widths


@dataclass(frozen=True)
class Part:
    """Linears that vLLM makes one of, or one that stands by itself.

    :param names: in the order of the model
    :param shapes: rows and columns of each
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(rows * columns for rows, columns in self.shapes)

    def bits(self, args: QuantizationArgs | None) -> int:
        """What it takes on the disk: codes, 16-bit scales and zero points; None for 16 bits."""
        return sum(_bits(rows, columns, args) for rows, columns in self.shapes)


def find_parts(model: torch.nn.Module, ignore: Iterable[str]) -> list[Part]:
    """Every part of a model that may be quantized.

    :param model: its shapes are enough (meta device)
    :param ignore: names and expressions of what stays as it is
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name in linear_widths(model, ["Linear"], ignore):
        found.setdefault(_place(name), []).append(name)
    return [
        Part(tuple(names), tuple(_shape(model, name) for name in names)) for names in found.values()
    ]


def _shape(model: torch.nn.Module, name: str) -> tuple[int, int]:
    module: Any = model.get_submodule(name)
    return module.out_features, module.in_features


def _place(name: str) -> tuple[str, ...]:
    """What two Linears have in common that must have one scheme."""
    if match := EXPERTS.match(name):
        return (match[1],)
    parent, _, last = name.rpartition(".")
    for together in FUSED:
        if last in together:
            return (parent, *together)
    return (name,)


def _bits(rows: int, columns: int, args: QuantizationArgs | None) -> int:
    if args is None:
        return 16 * rows * columns
    bits = args.num_bits
    groups = columns // args.group_size if args.strategy == QuantizationStrategy.GROUP else 1
    words = 32 * rows * math.ceil(columns * bits / 32)
    zero_points = 0 if args.symmetric else rows * groups * bits
    return words + 16 * rows * groups + zero_points


def expressions(names: Iterable[str]) -> list[str]:
    """Expressions for Linears of decoder layers, one for each kind, whatever stands before them."""
    layers: dict[str, list[str]] = {}
    others = []
    for name in names:
        if match := re.match(r"(?:.*\.)?layers\.(\d+)\.(.+)$", name):
            kind = ".".join(r"\d+" if part.isdigit() else part for part in match[2].split("."))
            layers.setdefault(kind.replace(".", r"\."), []).append(match[1])
        else:
            others.append(name)
    return others + [
        rf"re:(.*\.)?layers\.({'|'.join(dict.fromkeys(numbers))})\.{kind}$"
        for kind, numbers in layers.items()
    ]
