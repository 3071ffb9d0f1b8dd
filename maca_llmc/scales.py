"""Scales chosen by what rounding will cost under the Hessian, not by the range of the weights.

GPTQ's loss is a sum over columns, ``sum_j (w_j - q_j)^2 / U_jj^2``, with ``w_j`` the weight as it
is when its turn comes and U the Cholesky factor of the dampened inverse Hessian (arXiv 2210.17323,
section 3; ``1 / U_jj^2`` is the variance of input j that the columns after it cannot make up for).
So that is what a step of one column costs, and what the range of a group is searched by here, on
the weights as they are at the start. The diagonal of H itself is a worse guide: it counts what the
later columns will compensate. What was measured is in ``benchmarks/ACCURACY.md``.

A symmetric scheme of b bits has one code more below zero than above. The sign of the scale says
which side of a group gets it, so both signs are tried: at 3 bits the codes -4 to 3 then reach as
far as the larger side needs. Every kernel multiplies by the scale, whatever its sign.
"""

from collections.abc import Iterator

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range

SHRINKS = tuple(1 - 0.025 * step for step in range(21))
"""What the range of a group is multiplied by, from all of it to half."""

SIGNED_BITS = 4
"""Widest codes for which the sign is searched: with more, one code more is worth nothing."""

RANGE_OBSERVERS = (None, "minmax", "memoryless_minmax")
"""What llm-compressor fills in where a recipe names no observer."""

WEIGHTS_AT_ONCE = 1 << 17
"""Weights searched together: few enough to stay in a CPU's second cache."""


def are_searched(args: QuantizationArgs) -> bool:
    """Whether a scheme's scales are searched for: integers by group or channel, and by default.

    A recipe that names an observer of its own (``memoryless_mse``) keeps it.
    """
    by_row = args.strategy in ("group", "channel")
    return by_row and args.type == QuantizationType.INT and args.observer in RANGE_OBSERVERS


def column_costs(upper: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """What a squared error of each column costs, ``1 / U_jj^2``, in the columns' own order.

    :param upper: ``[d, d]``, U with ``(H + damp I)^-1 = U^T U``
    :param order: ``[d]``, the columns in the order of U; None as they are
    :return: ``[d]``
    """
    costs = upper.diagonal().square().reciprocal()
    if order is None:
        return costs
    return torch.empty_like(costs).scatter_(0, order, costs)


@torch.no_grad()
def search_scales(
    weight: torch.Tensor, costs: torch.Tensor, args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale of each group of columns that costs least.

    :param weight: ``[rows, d]``, in the dtype that scales are stored in
    :param costs: ``[d]``, of a squared error of each column
    :param args: integers, by group or channel
    :return: scale and zero point, ``[rows, d / group_size]`` (``[rows, 1]`` by channel), as
        llm-compressor's observers give them
    """
    size = args.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    by_group = costs.view(-1, size)
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    found = [_search(part, by_group, args) for part in groups.split(rows)]
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def _search(
    weight: torch.Tensor, costs: torch.Tensor, args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = calculate_range(args, weight.device)
    wanted = weight.float()
    least = torch.full(weight.shape[:2], torch.inf, device=weight.device)
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for scale, zero_point in _candidates(weight, args):
        step, shift = scale.float().unsqueeze(-1), zero_point.float().unsqueeze(-1)
        codes = (wanted / step + shift).clamp_(low, high).round_()
        error = codes.sub_(shift).mul_(step).sub_(wanted)
        cost = torch.einsum("rgs,rgs,gs->rg", error, error, costs)
        if best is None:
            best = scale, zero_point
        better = cost < least
        least = torch.where(better, cost, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
    assert best is not None
    return best


def _candidates(
    weight: torch.Tensor, args: QuantizationArgs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zero points ``[rows, groups]``; the first are those of the whole range."""
    lowest, highest = torch.aminmax(weight, dim=-1)
    signed = args.symmetric and args.num_bits <= SIGNED_BITS
    for shrink in SHRINKS:
        scale, zero_point = calculate_qparams(lowest * shrink, highest * shrink, args)
        yield scale, zero_point
        if signed:
            yield -scale, zero_point
