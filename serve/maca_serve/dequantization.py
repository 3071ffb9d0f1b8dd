"""Weights of a pack-quantized module, from the tensors that a checkpoint stores."""

import torch

from maca_serve.doctor.layouts import Scheme
from maca_serve.packing import unpack, unpack_columns

PACKED = "pack-quantized"


def dequantize(
    tensors: dict[str, torch.Tensor], scheme: Scheme, size: tuple[int, int]
) -> torch.Tensor:
    """(code - zero point) * scale, computed in the dtype of the scales as vLLM and transformers do.

    Args:
        tensors: by suffix: `weight_packed`, `weight_scale` [out, groups], and where the module has
            them `weight_zero_point` and `weight_g_idx` (the group of each input feature).
        scheme: how it is stored.
        size: (output features, input features).

    Returns:
        The weight, out x in, in the dtype of the scales.

    Raises:
        ValueError: tensors that do not fit the size.
    """
    out, width = size
    scale = tensors["weight_scale"]
    groups = _groups(tensors, scheme, width)
    weight = unpack(tensors["weight_packed"], scheme.bits, width).to(scale.dtype)
    if not scheme.symmetric:
        zero_points = unpack_columns(tensors["weight_zero_point"], scheme.bits, out)
        weight -= zero_points.to(scale.dtype)[:, groups]
    weight *= scale[:, groups]
    return weight


def _groups(tensors: dict[str, torch.Tensor], scheme: Scheme, width: int) -> torch.Tensor:
    if "weight_g_idx" in tensors:
        return tensors["weight_g_idx"].long()
    return torch.arange(width) // (scheme.group_size or width)
