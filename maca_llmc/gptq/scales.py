"""Scales chosen by what rounding will cost under the Hessian, not by the range of the weights.

GPTQ's loss is a sum over columns, ``sum_j (w_j - q_j)^2 / U_jj^2``, with ``w_j`` the weight as it
is when its turn comes and U the Cholesky factor of the dampened inverse Hessian (arXiv 2210.17323,
section 3; ``1 / U_jj^2`` is the variance of input j that the columns after it cannot make up for).
So that is what a step of one column costs, and what the range of a group is searched by here, on
the weights as they are at the start. The diagonal of H itself is a worse guide: it counts what the
later columns will compensate.

That sum takes the columns' errors for independent. One part of them never is: what a scale does to
all weights of its group at once. A range that clips makes them smaller by a common share s, and the
next group's does the same, so that the error is ``-s w`` and costs ``s^2 w H w^T``, several times
what the sum says. The share of a group is ``<w - q, w> / <w, w>`` under the costs, and counts by
the row's own ratio of the two. Without this all outputs shrink together, which some models bear and
others do not. What was measured is in ``benchmarks/ACCURACY.md``.

A symmetric scheme of b bits has one code more below zero than above. The sign of the scale says
which side of a group gets it, so both signs are tried: at 3 bits the codes -4 to 3 then reach as
far as the larger side needs. Every kernel multiplies by the scale, whatever its sign; the
modifier's ``signed_scales`` is for those that do not.
"""

from dataclasses import dataclass, fields
from itertools import product

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range

COARSE = tuple(1 - 0.075 * step for step in range(7))
"""What the range of a group is multiplied by at first, from all of it to about half."""

FINE = (-0.025, 0.025)
"""What is then added to the best of these: between them they are all multiples of 0.025."""

SIGNED_BITS = 4
"""Widest codes for which the sign is searched: with more, one code more is worth nothing."""

RANGE_OBSERVERS = (None, "minmax", "memoryless_minmax")
"""What llm-compressor fills in where a recipe names no observer."""

WEIGHTS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Weights searched together: few enough to stay in a CPU's second cache, and on a GPU enough that
its time goes into them and not into starting kernels (some 200 MB with all copies)."""


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
    weight: torch.Tensor,
    costs: torch.Tensor,
    energies: torch.Tensor,
    args: QuantizationArgs,
    signed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale of each group of columns that costs least.

    :param weight: ``[rows, d]``, in the dtype that scales are stored in
    :param costs: ``[d]``, of a squared error of each column
    :param energies: ``[rows]``, ``w H w^T`` of each
    :param args: integers, by group or channel
    :param signed: try negative scales, too, where they may be worth a code
    :return: scale and zero point, ``[rows, d / group_size]`` (``[rows, 1]`` by channel), as
        llm-compressor's observers give them
    """
    size = args.group_size if args.strategy == "group" else weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    by_group = costs.view(-1, size)
    at_once = WEIGHTS_AT_ONCE.get(weight.device.type, weight.numel())
    rows = max(1, at_once // weight.shape[1])
    found = [
        _search(part, _Cost.of(part.float(), by_group, energy), args, signed)
        for part, energy in zip(groups.split(rows), energies.split(rows), strict=True)
    ]
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


@dataclass
class _Cost:
    """What rounding some rows costs, by group.

    Attributes:
        wanted: ``[rows, groups, size]``, the weights.
        columns: ``[groups, size]``, cost of a squared error of each column.
        along: ``[rows, groups, size]``, its product with an error is the part along the weights.
        common: ``[rows, groups]``, what the square of that part costs beyond the columns' own.
    """

    wanted: torch.Tensor
    columns: torch.Tensor
    along: torch.Tensor
    common: torch.Tensor

    @classmethod
    def of(cls, wanted: torch.Tensor, columns: torch.Tensor, energies: torch.Tensor) -> "_Cost":
        along = wanted * columns
        own = torch.linalg.vecdot(along, wanted).clamp_min_(torch.finfo(torch.float32).tiny)
        ratios = energies / own.sum(dim=1)
        common = (ratios - 1).clamp_min_(0).unsqueeze(1) / own
        # a group of zeros has nothing to shrink, and infinity times that is not a number
        return cls(wanted, columns, along, common.nan_to_num_(posinf=0.0))

    def __call__(
        self, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantizationArgs
    ) -> torch.Tensor:
        """``[rows, groups]``"""
        low, high = calculate_range(args, "cpu")
        steps = scale.float()
        scaled = self.wanted * steps.reciprocal().unsqueeze(-1)
        if not args.symmetric:
            scaled += zero_point.unsqueeze(-1)
        error = scaled.round().clamp_(float(low), float(high)).sub_(scaled)
        common = torch.linalg.vecdot(error, self.along).square_().mul_(self.common)
        own = torch.linalg.vecdot(error * self.columns, error)
        return own.add_(common).mul_(steps.square())


@dataclass
class _Best:
    """What costs least so far, by row and group."""

    cost: torch.Tensor
    shrink: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def take(self, better: torch.Tensor, other: "_Best") -> None:
        for field in fields(self):
            own, new = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, torch.where(better, new, own))


def _search(
    weight: torch.Tensor, cost: _Cost, args: QuantizationArgs, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    lowest, highest = torch.aminmax(weight, dim=-1)
    signs = (1, -1) if signed and args.symmetric and args.num_bits <= SIGNED_BITS else (1,)

    def candidate(shrink: torch.Tensor) -> _Best:
        size = shrink.abs()
        ends = ((end * size).to(end.dtype) for end in (lowest, highest))
        scale, zero_point = calculate_qparams(*ends, args)
        scale = torch.where(shrink < 0, -scale, scale)
        return _Best(cost(scale, zero_point, args), shrink, scale, zero_point)

    best = candidate(torch.ones(lowest.shape, device=weight.device))
    for shrink, sign in product(COARSE, signs):
        other = candidate(torch.full_like(best.shrink, shrink * sign))
        best.take(other.cost < best.cost, other)
    coarse = best.shrink
    for step in FINE:
        other = candidate(coarse + step * coarse.sign())
        best.take(other.cost < best.cost, other)
    return best.scale, best.zero_point
