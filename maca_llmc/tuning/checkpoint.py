"""Read the integer weights of a compressed-tensors checkpoint, and write them back into a copy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors import safe_open
from safetensors.torch import save_file

from maca_llmc.common.errors import UserError
from maca_llmc.tuning.integers import IntegerWeight

BITS = range(2, 9)


def read_weights(folder: Path) -> dict[str, IntegerWeight]:
    """Every integer weight of a checkpoint, by the name of its Linear.

    :raises UserError: when it has none, or has one that cannot be tuned (named, with the reason)
    """
    tensors = _quantized_tensors(folder)
    weights = {name: _unpack(name, parts) for name, parts in tensors.items()}
    if not weights:
        raise UserError(
            f"{folder} has no integer weights (pack-quantized or int-quantized): tune takes "
            "checkpoints of 2 to 8 bits that llm-compressor or maca-llmc wrote"
        )
    return weights


def write_weights(source: Path, folder: Path, weights: dict[str, IntegerWeight]) -> None:
    """Copy a checkpoint with these weights in it; every other tensor stays byte for byte.

    :param folder: must exist and be empty
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy2(path, folder / path.name)
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for key in tensors:
            name, _, kind = key.rpartition(".")
            if name in weights and kind in ("weight", "weight_packed", "weight_scale"):
                tensors[key] = _packed(weights[name], kind, tensors[key])
        save_file(tensors, folder / path.name, metadata=metadata)


def _quantized_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By Linear, its tensors whose names begin with ``weight``."""
    scaled = {name for name, kind, _ in _headers(folder) if kind == "weight_scale"}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, kind = key.rpartition(".")
                if name in scaled and kind.startswith("weight"):
                    found.setdefault(name, {})[kind] = file.get_tensor(key)
    return found


def _headers(folder: Path) -> Iterator[tuple[str, str, Path]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, kind = key.rpartition(".")
                yield name, kind, path


def _unpack(name: str, parts: dict[str, torch.Tensor]) -> IntegerWeight:
    scale = parts["weight_scale"]
    scale = scale.view(-1, 1) if scale.ndim == 1 else scale
    zero_point = parts.get("weight_zero_point")
    if "weight_g_idx" in parts:
        raise UserError(f"{name} has groups in activation order (weight_g_idx): not supported")
    if "weight_packed" in parts:
        rows, columns = parts["weight_shape"].tolist()
        bits = _bits(name, parts["weight_packed"], columns)
        codes = unpack_from_int32(parts["weight_packed"], bits, (rows, columns))
        if zero_point is not None:
            shape = (rows, scale.shape[1])
            zero_point = unpack_from_int32(zero_point, bits, shape, packed_dim=0)
    else:
        codes = parts["weight"]
        if codes.dtype != torch.int8:
            raise UserError(f"{name} has weights of {codes.dtype}: tune takes integers only")
    if scale.shape[0] != codes.shape[0] or codes.shape[1] % scale.shape[1]:
        raise UserError(
            f"{name} has scales of shape {list(scale.shape)} for weights of {list(codes.shape)}: "
            "tune takes scales by group or channel"
        )
    return IntegerWeight(codes, scale, zero_point)


def _bits(name: str, packed: torch.Tensor, columns: int) -> int:
    """How many bits a code takes, from how many words a row takes."""
    for bits in BITS:
        if packed.shape[1] == -(-columns * bits // 32):
            return bits
    raise UserError(
        f"{name} packs {columns} codes into {packed.shape[1]} words, a layout of compressed-tensors"
        " before 0.18: quantize it again"
    )


def _packed(weight: IntegerWeight, kind: str, stored: torch.Tensor) -> torch.Tensor:
    """A weight's part in the shape and layout in which it is stored."""
    if kind == "weight_scale":
        return weight.scale.to(stored.dtype).reshape(stored.shape)
    if kind == "weight":
        return weight.codes
    bits = _bits("", stored, weight.codes.shape[1])
    return pack_to_int32(weight.codes, bits).contiguous()
