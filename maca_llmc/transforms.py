"""Modifiers that change weights before those that quantize see them.

Rotations (SpinQuant, QuIP) do it when calibration starts, smoothers (SmoothQuant, AWQ) layer by
layer, by what went through it. llm-compressor's sequential pipeline calibrates all modifiers in
one pass, so that the Hessians behind a smoother are of inputs that it then divides. Here a smoother
has a pass of its own through the layer, and what comes after it sees what it left.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from maca_llmc.llmcompressor_api import QuantizationMixin


def transforms(modifiers: Sequence[Any]) -> list[Any]:
    """Those that stand before the first one that quantizes."""
    return list(takewhile(lambda modifier: not isinstance(modifier, QuantizationMixin), modifiers))


def smoothers(modifiers: Sequence[Any]) -> list[Any]:
    """Those among :func:`transforms` that want to see data."""
    return [modifier for modifier in transforms(modifiers) if modifier.requires_calibration_data]
