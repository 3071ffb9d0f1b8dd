"""Modifiers that change weights before those that quantize see them.

Rotations (SpinQuant, QuIP) do it when calibration starts, smoothers (SmoothQuant, AWQ) layer by
layer, by what went through it. llm-compressor's sequential pipeline calibrates all modifiers in
one pass, so that the Hessians behind a smoother are of inputs that it then divides. Here a smoother
has a pass of its own through the layer, and what comes after it sees what it left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from traceback import walk_tb
from typing import Any

import torch

from maca_llmc.common.errors import CalibrationError, UserError, first_line
from maca_llmc.common.resource_errors import is_disk_full, is_out_of_memory
from maca_llmc.llmcompressor_api import QuantizationMixin

CHANGE_LIMIT = 0.25
"""Most that smoothing may change a layer's output, relative to what the layer adds to its input.

Rounding of bfloat16 weights accounts for 1 to 2 % (SmolLM2), a norm that does not feed the Linears
that were to make up for it for about 90 (Gemma 2 and 3, random weights).
"""


def transforms(modifiers: Sequence[Any]) -> list[Any]:
    """Those that stand before the first one that quantizes."""
    return list(takewhile(lambda modifier: not isinstance(modifier, QuantizationMixin), modifiers))


def smoothers(modifiers: Sequence[Any]) -> list[Any]:
    """Those among :func:`transforms` that want to see data."""
    return [modifier for modifier in transforms(modifiers) if modifier.requires_calibration_data]


@contextmanager
def keeping_function(
    modifier: Any, where: str, update: Callable[[], torch.Tensor]
) -> Iterator[None]:
    """Refuse a smoother that changes what a layer computes.

    It should only move factors from activations into weights. Mappings that were made for another
    architecture divide one norm and multiply Linears that another one feeds.

    :param where: the layer, for the message
    :param update: computes what the layer adds to some hidden states
    :raises CalibrationError: names the modifier, and by how much the layer has changed
    """
    before = update()
    yield
    change = float(torch.linalg.norm(update() - before) / torch.linalg.norm(before))
    if not change <= CHANGE_LIMIT:
        raise CalibrationError(
            f"{type(modifier).__name__} changes what {where} computes (by {change:.0%}): its "
            "mappings are not for this architecture, give it mappings of your own or leave it out"
        )


@contextmanager
def named_refusals(modifiers: Sequence[Any]) -> Iterator[None]:
    """Say in one line which transform failed: llm-compressor's know some architectures only.

    :param modifiers: all of the recipe
    :raises UserError: instead of an error that came out of one of :func:`transforms`
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error) or is_disk_full(error):
            raise
        own = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
        failed = next((m for m in transforms(modifiers) if any(m is one for one in own)), None)
        if failed is None:
            raise
        raise UserError(
            f"{type(failed).__name__} does not take this model: {first_line(error)}: give "
            "it mappings that fit, or leave it out"
        ) from error
