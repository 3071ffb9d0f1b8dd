"""How much each token of a calibration sequence weighs in the Hessian.

Every variant is ``H = sum_i sum_t w_{i,t} x_{i,t} x_{i,t}^T``; this file holds ``w``:

==========================  =====================================================================
GPTQ                        ``w = 1``                                       (``exponent = 0``)
MaCa, per sequence          ``w = 1 / L_i``                                 (``exponent = 1``)
tempered                    ``w = L_i^-p``                                  (``0 <= p <= 1``)
nested (Matryoshka)         ``S_i = {l in S : l < L_i} + {L_i}``,
                            ``w_{i,t} = sum over l in S_i with l >= t of l^-p``, t from 1
==========================  =====================================================================

The first token of a sequence, in most models an attention sink with activations hundreds of times
larger than any other, may weigh a multiple of that: short sequences have more first tokens, and
this tells the effect of that share from the effect of lengths.

Lengths are divided by a reference length first, so that sequences of one length weigh exactly 1:
a common factor cancels under relative dampening, and this way normalising changes nothing, bit
for bit, where there is nothing to normalise.

This is our reading of MaCa (arXiv 2602.07465); see docs/method.md for what is public of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Tokens ``start <= t < stop`` (from 0) of one sequence, all of weight ``weight``."""

    start: int
    stop: int
    weight: float


def sequence_segments(
    length: int,
    exponent: float,
    scales: Sequence[int] | None = None,
    reference: int = 1,
    first: float = 1.0,
) -> list[Segment]:
    """Cut one sequence into the segments whose tokens weigh the same.

    :param length: valid tokens of the sequence, at least 1
    :param exponent: p of ``l^-p``
    :param scales: nested lengths, increasing; None for the sequence as a whole only
    :param reference: the length whose weight is 1
    :param first: how many times its weight the first token gets
    :return: segments in order, covering ``[0, length)``
    :raises ValueError: when ``length`` or ``reference`` is not positive
    """
    if length < 1 or reference < 1:
        raise ValueError(f"lengths must be positive, got {length} with reference {reference}")
    prefixes = [scale for scale in scales or () if scale < length] + [length]
    segments = []
    for index, stop in enumerate(prefixes):
        start = prefixes[index - 1] if index else 0
        weight = sum((prefix / reference) ** -exponent for prefix in prefixes[index:])
        segments.append(Segment(start, stop, weight))
    return segments if first == 1.0 else _with_first_token(segments, first)


def _with_first_token(segments: list[Segment], first: float) -> list[Segment]:
    opening, *others = segments
    rest = [Segment(1, opening.stop, opening.weight)] if opening.stop > 1 else []
    return [Segment(0, 1, first * opening.weight), *rest, *others]


def total_weight(segments: Sequence[Segment]) -> tuple[float, int]:
    """Total weight of the tokens in ``segments`` and how many tokens they are."""
    total = sum((segment.stop - segment.start) * segment.weight for segment in segments)
    return total, sum(segment.stop - segment.start for segment in segments)
