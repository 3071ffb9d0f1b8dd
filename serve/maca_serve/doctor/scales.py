"""Values of a checkpoint's scales, about which headers say nothing."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from maca_serve.doctor.headers import Tensor
from maca_serve.doctor.layouts import FLOATS

# Scales by which activations, keys and values are divided.
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "q_scale", "k_scale", "v_scale", "kv_scale")


def find_scales(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Tensors of a folder that hold scales, in whichever format's name for them, or norms."""
    return [
        tensor
        for tensor in tensors.values()
        if "scale" in tensor.name.rpartition(".")[2]
        or (len(tensor.shape) <= 1 and tensor.dtype in FLOATS)
    ]


@dataclass
class Values:
    """What scales hold.

    Attributes:
        broken: names of those with NaN or infinity: one such value spoils all that follows it.
        negative: names of those with a value below zero, which not every kernel takes.
        impossible: names of those of activations or a cache with a value that is not above zero.
    """

    broken: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)


def read_values(scales: Iterable[Tensor]) -> Values:
    """Look at every value.

    Args:
        scales: from `find_scales`.
    """
    names: dict[Path, list[str]] = defaultdict(list)
    for tensor in scales:
        names[tensor.file].append(tensor.name)
    values = Values()
    # A file once: opening it reads its whole header, of tens of thousands of tensors with experts.
    for path, wanted in names.items():
        with safe_open(path, framework="pt") as file:
            for name in wanted:
                tensor = file.get_tensor(name).float()
                if not tensor.isfinite().all():
                    values.broken.append(name)
                if (tensor < 0).any():
                    values.negative.append(name)
                if name.endswith(_OF_ACTIVATIONS) and (tensor <= 0).any():
                    values.impossible.append(name)
    return values
