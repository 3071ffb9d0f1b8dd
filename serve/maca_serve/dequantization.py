"""Weights of a quantized module, from the tensors that a checkpoint stores."""

import torch

from maca_serve.doctor.layouts import Scheme
from maca_serve.packing import unpack, unpack_columns

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")


def dequantize(
    tensors: dict[str, torch.Tensor], scheme: Scheme, size: tuple[int, int]
) -> torch.Tensor:
    """(code - zero point) * scale, computed in the dtype of the scales as vLLM and transformers do.

    Args:
        tensors: by suffix: codes in `weight_packed`, or one by one in `weight`; `weight_scale`, and
            where the module has them `weight_zero_point` and `weight_g_idx` (the group of each
            input feature).
        scheme: how it is stored, in PACKED or one of PLAIN.
        size: (output features, input features).

    Returns:
        The weight, out x in, in the dtype of the scales.

    Raises:
        ValueError: tensors that do not fit the size.
    """
    scale, zero_points = tensors["weight_scale"], tensors.get("weight_zero_point")
    if "weight_packed" in tensors:
        codes = unpack(tensors["weight_packed"], scheme.bits, size[1])
        if zero_points is not None:
            zero_points = unpack_columns(zero_points, scheme.bits, size[0])
    else:
        codes = tensors["weight"]
    weight = codes.to(scale.dtype)
    columns = _groups(tensors, scheme, size[1])
    if not scheme.symmetric and zero_points is not None:
        weight -= _spread(zero_points.to(scale.dtype), scheme, size, columns)
    weight *= _spread(scale, scheme, size, columns)
    return weight


def _groups(tensors: dict[str, torch.Tensor], scheme: Scheme, width: int) -> torch.Tensor:
    if "weight_g_idx" in tensors:
        return tensors["weight_g_idx"].long()
    return torch.arange(width) // (scheme.group_size or width)


def _spread(
    values: torch.Tensor, scheme: Scheme, size: tuple[int, int], columns: torch.Tensor
) -> torch.Tensor:
    """Values of groups, channels, blocks or the whole tensor, for every weight."""
    if scheme.strategy == "tensor":
        return values.reshape(1, 1)
    if scheme.block is None:
        return values[:, columns]
    height, width = scheme.block
    rows = values.repeat_interleave(height, 0)[: size[0]]
    return rows.repeat_interleave(width, 1)[:, : size[1]]
