"""GPTAQ's part of the solve: a column's rounding also makes up for what its input has become.

In GPTQ layer k's inputs come from quantized layers, and its target is what the layer makes of
these. GPTAQ (arXiv 2504.02692) aims at what it makes of the full-precision inputs instead. With
``D = sum_t weight_t (x_fp - x_q) x_q^T``, the columns after column j take over, beside j's
rounding error, what ``w_j`` times the change of its input was:

    w_later += w_j P_j,later      P = alpha * triu(D U^T, 1) U

with ``(H + damp I)^-1 = U^T U`` and ``w_j`` as it is just before it is rounded, within a block of
columns and across blocks, so that the result does not depend on the block size.
"""

from typing import Any

import torch

from maca_llmc.gptq.block_update import update_block
from maca_llmc.gptq.cpu_sweep import sweep_block
from maca_llmc.gptq.solve import Factor


def feedback(cross: torch.Tensor, factor: Factor, alpha: float) -> torch.Tensor:
    """P, in the order of the sweep.

    :param cross: D, ``[d, d]``, divided as H is; left as it is
    :param factor: of H
    :param alpha: 1 aims at the full-precision inputs, 0 at those of the quantized model
    :return: ``[d, d]``, zero on and below the diagonal
    """
    order = factor.order
    work = cross.clone() if order is None else cross[order[:, None], order]
    if factor.dead is not None:
        work[factor.dead] = 0
        work[:, factor.dead] = 0
    return alpha * (work @ factor.upper.t()).triu(1) @ factor.upper


def asymmetric_block_update(block: torch.Tensor, *tensors: torch.Tensor, **given: Any) -> None:
    """Quantize one block of columns; arguments as of ``update_block``, ``feed`` among them."""
    sweep = sweep_block if block.device.type == "cpu" else eager_sweep_block
    update_block(sweep, block, *tensors, **given)


def eager_sweep_block(
    work: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    code_range: tuple[float, float],
    quantized: torch.Tensor,
    errors: torch.Tensor,
    feed: torch.Tensor,
) -> None:
    """``compiled_sweep.sweep_block`` in torch, for any device."""
    shift = torch.zeros_like(scale) if zero_point is None else zero_point
    for column in range(work.shape[1]):
        before, step, zero = work[:, column], scale[:, column].float(), shift[:, column].float()
        codes = (before / step + zero).clamp_(*code_range).round_()
        quantized[:, column] = ((codes - zero) * step).to(scale.dtype)
        errors[:, column] = (before - quantized[:, column]) / factor[column, column]
        later = slice(column + 1, None)
        work[:, later] -= errors[:, column, None] * factor[column, later]
        work[:, later] += before[:, None] * feed[column, later]
