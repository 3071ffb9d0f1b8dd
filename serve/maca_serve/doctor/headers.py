"""Safetensors headers of a checkpoint folder: names, dtypes and shapes without the weights."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError

INDEX = "model.safetensors.index.json"
# The format's own limit: a longer header means that the file is something else.
MAX_HEADER_BYTES = 100_000_000
# Of what engines compute in.
VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_CONVERTED = ("BF16", "F16", "F32")
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BOOL": 8}


@dataclass(frozen=True)
class Tensor:
    """What a header says about one tensor.

    Attributes:
        name: its name.
        dtype: safetensors' name of its type, for instance `I32`.
        shape: its shape.
        file: the file that holds it.
        start: where its bytes begin in the file.
        size: its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def loaded_bytes(self, dtype: str = "bfloat16") -> int:
        """What it takes in an engine that computes in `dtype`, to which vLLM converts weights.

        Codes stay as they are, and so do scales.
        """
        converted = self.dtype in _CONVERTED and self.name.endswith(".weight")
        return prod(self.shape) * VALUE_BYTES[dtype] if converted else self.size


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder by name.

    With an index only the files it names are read, as vLLM does.

    Raises:
        UserError: no safetensors, a shard missing or outside the folder, a file cut short, two
            files with the same tensor, or an index that disagrees with the files.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_index(index)
        tensors = _read_files([folder / name for name in sorted(set(weight_map.values()))])
        _compare(index, weight_map, tensors)
        return tensors
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: it has no *.safetensors files, whose headers the doctor reads;"
            " convert *.bin weights with transformers' save_pretrained"
        )
    return _read_files(files)


def read_integers(tensor: Tensor) -> tuple[int, ...]:
    """Values of a small int64 tensor, for instance `weight_shape`."""
    count = prod(tensor.shape)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return struct.unpack(f"<{count}q", file.read(8 * count))


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: no readable weight_map ({error}); download or make it again"
        ) from error
    for file in files:
        path = index.parent / str(file)
        if Path(str(file)).name != file:
            raise UserError(f"{index}: names {file}, which is not a file of this folder")
        if not path.is_file():
            raise UserError(f"{path}: missing, and {INDEX} names it; download or make it again")
    return dict(weight_map)


def _read_files(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in _read_file(file):
            if tensor.name in tensors:
                raise UserError(
                    f"{file}: holds {tensor.name}, as {tensors[tensor.name].file.name} does;"
                    f" remove one of the files, or write {INDEX}"
                )
            tensors[tensor.name] = tensor
    return tensors


def _compare(index: Path, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index}: says that {name} is in {file}, and it is not")


def _read_file(path: Path) -> list[Tensor]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = [_parse(path, name, 8 + length, entry) for name, entry in entries.items()]
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{path}: not a safetensors file ({error}); download or make it again"
        ) from error
    if 8 + length + end != size:
        raise UserError(
            f"{path}: {size} bytes long where its header promises {8 + length + end};"
            " it was cut short: download or make it again"
        )
    return tensors


def _parse(path: Path, name: str, base: int, entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    digits = dtype.lstrip("BFIU").partition("_")[0]
    bits = _BITS.get(dtype) or int(digits)
    if 8 * (end - begin) != bits * prod(shape):
        raise ValueError(f"{name} takes {end - begin} bytes for {dtype} {list(shape)}")
    return Tensor(name, dtype, shape, path, base + begin, end - begin)
