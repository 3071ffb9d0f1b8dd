"""Codes that tensor parallelism or fusing would tear apart inside a 32-bit word.

vLLM cuts packed tensors at whole words. Where a rank's share or a fused part is not a whole number
of words it reads others' codes, without a word about it.
"""

from typing import Any

from maca_serve.doctor.checks import Problem
from maca_serve.doctor.layouts import Scheme


def torn_words(entry: dict[str, Any], scheme: Scheme) -> Problem | None:
    """The problem with a layer's words, None when all cuts are between words.

    Args:
        entry: a layer of the worker's answer.
        scheme: of its modules.
    """
    if entry["partition"] is None or scheme.format not in ("pack-quantized", "gptq", "awq"):
        return None
    width = entry["partition"][1]
    whole_width = entry["shape"][1]
    cuts = []
    if scheme.format != "awq" and width != whole_width:
        cuts.append(("input features of a rank", width))
    # Packed along the output are AWQ's codes and everyone's zero points, fused or cut.
    if scheme.format == "awq" or not scheme.symmetric:
        cuts += [("output features of a part on a rank", count) for count in entry["outs"]]
    torn = [(what, count) for what, count in cuts if count * scheme.bits % 32]
    if not torn:
        return None
    what, count = torn[0]
    return Problem(
        "error",
        f"{count} {what} x {scheme.bits} bits are not whole 32-bit words, and vLLM cuts at words",
        "use fewer tensor-parallel ranks, or a model whose widths divide",
        [entry["layer"]],
    )
