"""Values of a checkpoint's scales, about which headers say nothing."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from maca_serve.doctor.headers import Tensor
from maca_serve.doctor.layouts import FLOATS


def find_scales(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Tensors of a folder that hold scales, in whichever format's name for them, or norms."""
    return [
        tensor
        for tensor in tensors.values()
        if "scale" in tensor.name.rpartition(".")[2]
        or (len(tensor.shape) <= 1 and tensor.dtype in FLOATS)
    ]


def not_finite(scales: Iterable[Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity: one such value spoils all that follows it."""
    names: dict[Path, list[str]] = defaultdict(list)
    for tensor in scales:
        names[tensor.file].append(tensor.name)
    bad = []
    # A file once: opening it reads its whole header, of tens of thousands of tensors with experts.
    for path, wanted in names.items():
        with safe_open(path, framework="pt") as file:
            bad += [x for x in wanted if not file.get_tensor(x).float().isfinite().all()]
    return bad
