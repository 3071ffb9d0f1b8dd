"""Accumulate a weighted Hessian and prepare it for GPTQ's dampening."""

import torch

GPTQ_FACTOR = 2.0
"""GPTQ's H is that of the squared error, 2 X^T X (arXiv 2210.17323, equation 2)."""


def add_rows(hessian: torch.Tensor, rows: torch.Tensor, weight: float) -> None:
    """``H += 2 * weight * rows^T rows``, in place.

    The weight is applied to the product, not to the rows, so that inputs are never rounded.

    :param hessian: float32 ``[d, d]``
    :param rows: ``[tokens, d]``, any float dtype; multiplied in float32
    :param weight: weight of each of these tokens, not negative
    """
    rows = rows.to(device=hessian.device, dtype=hessian.dtype)
    hessian.addmm_(rows.t(), rows, alpha=GPTQ_FACTOR * weight)


def fill_dead_columns(hessian: torch.Tensor) -> int:
    """Give columns that no token ever excited the mean diagonal of the live ones, in place.

    Stock GPTQ writes an absolute 1 there and then dampens by a mean that includes it, so a common
    factor on H would no longer cancel. With the live mean it does, and a dead column, which is
    uncorrelated with all others, is simply rounded to nearest.

    :param hessian: ``[d, d]``
    :return: how many columns were dead; ``d`` when all are, in which case H becomes the identity
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    count = int(dead.sum())
    if count == diagonal.numel():
        diagonal.fill_(1.0)
    elif count:
        diagonal[dead] = diagonal[~dead].mean()
    return count
