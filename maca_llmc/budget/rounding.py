"""What rounding a weight to a scheme's codes does to it, before any compensation."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Shares of a group's range that are tried; the best by weighted squared error is taken."""


def squared_errors(
    weight: torch.Tensor, args: QuantizationArgs, columns: torch.Tensor
) -> torch.Tensor:
    """Squared errors of rounding to nearest, float32 ``[rows, columns]``.

    :param weight: ``[rows, columns]``
    :param args: integers by group or channel
    :param columns: how much each column counts when a group's range is chosen, ``[columns]``
    """
    groups = 1
    if args.strategy == QuantizationStrategy.GROUP:
        groups = weight.shape[1] // int(args.group_size or 1)
    grouped = weight.float().unflatten(1, (groups, -1))
    counts = columns.float().view(1, groups, -1)
    best, errors = None, torch.empty_like(grouped)
    for shrink in SHRINKS:
        tried = (_rounded(grouped, args, shrink) - grouped).square()
        cost = (tried * counts).sum(-1, keepdim=True)
        if best is None:
            best, errors = cost, tried
        else:
            better = cost < best
            best, errors = torch.where(better, cost, best), torch.where(better, tried, errors)
    return errors.flatten(1)


def _rounded(grouped: torch.Tensor, args: QuantizationArgs, shrink: float) -> torch.Tensor:
    levels = 2**args.num_bits
    if args.symmetric:
        low, high = -levels // 2, levels // 2 - 1
        scale = grouped.abs().amax(-1, keepdim=True) * shrink * 2 / (levels - 1)
        zero = torch.zeros_like(scale)
    else:
        low, high = 0, levels - 1
        bottom = grouped.amin(-1, keepdim=True).clamp_max(0) * shrink
        top = grouped.amax(-1, keepdim=True).clamp_min(0) * shrink
        scale = (top - bottom) / (levels - 1)
        zero = (-bottom / scale.clamp_min(1e-12)).round()
    scale = scale.clamp_min(1e-12)
    return ((grouped / scale + zero).round().clamp(low, high) - zero) * scale
