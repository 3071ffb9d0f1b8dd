"""Values of a checkpoint's scales, about which headers say nothing."""

from collections.abc import Iterable

from safetensors import safe_open

from maca_serve.doctor.headers import Tensor


def find_scales(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Tensors of a folder that hold scales, in whichever format's name for them."""
    return [tensor for tensor in tensors.values() if "scale" in tensor.name.rpartition(".")[2]]


def not_finite(scales: Iterable[Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity: one such value spoils all that follows it."""
    return [tensor.name for tensor in scales if not _finite(tensor)]


def _finite(tensor: Tensor) -> bool:
    with safe_open(tensor.file, framework="pt") as file:
        return bool(file.get_tensor(tensor.name).float().isfinite().all())
