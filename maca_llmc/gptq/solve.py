"""GPTQ's solve for weights that share a Hessian: one factorisation, one sweep over all rows.

The equations are those of GPTQ (arXiv 2210.17323, Algorithm 1), in the order of operations of
llm-compressor, so that given the same Hessian the codes are the same. Rows do not depend on each
other: stacking the weights of several modules changes nothing but the time it takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BlockUpdate = Callable[..., None]
"""llm-compressor's ``gptq_block_update``, scales given: ``(W1, Hinv1, Q1, Err1, losses1, i1=)``."""

DAMPENING_STEP = 10.0
DAMPENING_LIMIT = 1.0
LEAST_DAMPENING = 1e-4


class NotPositiveDefiniteError(ValueError):
    """The Hessian could not be factorised with any dampening that still leaves something of it."""


@dataclass(frozen=True)
class Factor:
    """A dampened Hessian's inverse, factorised.

    :param upper: ``[d, d]``, upper triangular U with ``(H + damp I)^-1 = U^T U``
    :param order: ``[d]``, the columns in the order they are quantized in; None as they are
    :param dead: bool ``[d]``, in that order: columns no token excited, whose weights become zero;
        None when there are none
    :param dampening: the one it took, relative to the mean diagonal
    """

    upper: torch.Tensor
    order: torch.Tensor | None
    dead: torch.Tensor | None
    dampening: float


def factorize(hessian: torch.Tensor, dampening: float, ordered: bool) -> Factor:
    """Dampen a Hessian and factorise its inverse.

    A Hessian that is not positive definite, by rounding or by too few tokens, gets ten times the
    dampening until it is, up to its whole mean diagonal.

    :param hessian: float32 ``[d, d]``, symmetric; left as it is
    :param dampening: relative to the mean diagonal
    :param ordered: quantize columns by descending diagonal (activation ordering)
    :raises NotPositiveDefiniteError: when no dampening up to 1 is enough
    """
    order = torch.argsort(hessian.diagonal(), descending=True) if ordered else None
    work = hessian.clone() if order is None else hessian[order[:, None], order]
    diagonal = work.diagonal()
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1.0)
    undamped = diagonal.clone()
    mean = torch.mean(undamped)
    tried = dampening
    while True:
        diagonal.copy_(undamped + tried * mean)
        upper = _factor_of_inverse(work)
        if upper is not None:
            return Factor(upper, order, dead if bool(dead.any()) else None, tried)
        if tried >= DAMPENING_LIMIT:
            raise NotPositiveDefiniteError(f"not positive definite with dampening {tried:g}")
        tried = min((tried or LEAST_DAMPENING) * DAMPENING_STEP, DAMPENING_LIMIT)


def _factor_of_inverse(matrix: torch.Tensor) -> torch.Tensor | None:
    """Upper U with ``matrix^-1 = U^T U``; None when ``matrix`` is not positive definite.

    The three steps are llm-compressor's, in its order: another way would give other last bits.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    return upper if info.item() == 0 else None


def sweep(
    weights: torch.Tensor,
    factors: list[Factor],
    update: BlockUpdate,
    block_size: int,
    feeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights column by column, each column's error spread over the columns after it.

    :param weights: float32 ``[b, rows, d]``, used up
    :param factors: one for each of the ``b``
    :param update: quantizes one block of columns
    :param block_size: columns per block
    :param feeds: ``[b, d, d]``, what each column adds to those after it (see ``asymmetry.py``);
        ``update`` then gets its block as ``feed=`` and leaves columns as they were before rounding
    :return: dequantized weights ``[b, rows, d]``, and each row's half squared output error
        ``(w - q) (H + damp I) (w - q)^T / 2``, ``[b, rows]``
    """
    ordered = factors[0].order is not None
    if ordered:
        orders = torch.stack([factor.order for factor in factors])  # type: ignore[misc]
        weights = torch.gather(weights, -1, orders.unsqueeze(-2).expand_as(weights))
    for index, factor in enumerate(factors):
        if factor.dead is not None:
            weights[index].masked_fill_(factor.dead, 0)
    # a view where there is one only: the stack of many is a copy
    upper = (
        factors[0].upper.unsqueeze(0)
        if len(factors) == 1
        else torch.stack([factor.upper for factor in factors])
    )
    losses = torch.zeros(weights.shape[:2], device=weights.device)
    for start in range(0, weights.shape[-1], block_size):
        stop = min(start + block_size, weights.shape[-1])
        block = weights[:, :, start:stop].clone()
        quantized, errors, squares = (torch.empty_like(block) for _ in range(3))
        factor_block = upper[:, start:stop, start:stop]
        fed = {} if feeds is None else {"feed": feeds[:, start:stop, start:stop]}
        update(block, factor_block, quantized, errors, squares, i1=start, **fed)
        weights[:, :, start:stop] = quantized
        losses += squares.sum(dim=2) / 2
        weights[:, :, stop:] -= torch.bmm(errors, upper[:, start:stop, stop:])
        if feeds is not None:
            weights[:, :, stop:] += torch.bmm(block, feeds[:, start:stop, stop:])
    if ordered:
        back = torch.argsort(orders, dim=-1)
        weights = torch.gather(weights, -1, back.unsqueeze(-2).expand_as(weights))
    return weights, losses
