"""Weights of a quantized module, from the tensors that a checkpoint stores."""

import torch

from maca_serve.doctor.layouts import Scheme
from maca_serve.formats.packing import unpack, unpack_columns

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
GPTQ, AWQ = "gptq", "awq"
FORMATS = (PACKED, *PLAIN, GPTQ, AWQ)
# AutoAWQ's words hold outputs 0, 2, 4, 6, 1, 3, 5, 7: where each of eight is found.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def dequantize(
    tensors: dict[str, torch.Tensor], scheme: Scheme, size: tuple[int, int]
) -> torch.Tensor:
    """(code - zero point) * scale, computed in the dtype of the scales as vLLM and transformers do.

    Args:
        tensors: by suffix, as `maca_serve.doctor.layouts` says of the format.
        scheme: how it is stored, in one of FORMATS.
        size: (output features, input features).

    Returns:
        The weight, out x in, in the dtype of the scales.

    Raises:
        ValueError: tensors that do not fit the size.
    """
    codes, scale, zero_points = _parts(tensors, scheme, size)
    weight = codes.to(scale.dtype)
    columns = _groups(tensors, scheme, size[1])
    if not scheme.symmetric and zero_points is not None:
        weight -= _spread(zero_points.to(scale.dtype), scheme, size, columns)
    weight *= _spread(scale, scheme, size, columns)
    return weight


def _parts(
    tensors: dict[str, torch.Tensor], scheme: Scheme, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, out x in; scales and zero points by output and group."""
    out, width = size
    if scheme.format == GPTQ:
        codes = unpack_columns(tensors["qweight"], scheme.bits, width).T
        zero_points = unpack(tensors["qzeros"], scheme.bits, out).T.short() + scheme.zero_offset
        return codes, tensors["scales"].T, zero_points
    if scheme.format == AWQ:
        zeros = tensors.get("qzeros")
        return (
            _unpack_awq(tensors["qweight"], scheme.bits, out).T,
            tensors["scales"].T,
            None if zeros is None else _unpack_awq(zeros, scheme.bits, out).T,
        )
    scale, zeros = tensors["weight_scale"], tensors.get("weight_zero_point")
    if scheme.format != PACKED:
        return tensors["weight"], scale, zeros
    codes = unpack(tensors["weight_packed"], scheme.bits, width)
    return codes, scale, None if zeros is None else unpack_columns(zeros, scheme.bits, out)


def _unpack_awq(words: torch.Tensor, bits: int, out: int) -> torch.Tensor:
    codes = unpack(words, bits, out)
    return codes.unflatten(1, (-1, len(AWQ_PLACES)))[..., AWQ_PLACES].flatten(1)


def _groups(tensors: dict[str, torch.Tensor], scheme: Scheme, width: int) -> torch.Tensor:
    """The group of each input feature."""
    if "weight_g_idx" in tensors:
        return tensors["weight_g_idx"].long()
    # AutoGPTQ stores one always, and vLLM goes by the config.
    if scheme.actorder and "g_idx" in tensors:
        return tensors["g_idx"].long()
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
