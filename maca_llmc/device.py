"""The device to compute on."""

import torch

from maca_llmc.errors import UserError


def resolve_device(device: str) -> torch.device:
    """The device by its name: "auto" (a CUDA device when there is one), "cpu", "cuda" or "cuda:N".

    :raises UserError: for any other name, or a CUDA device that is not there
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"device {device!r}: give auto, cpu, cuda or cuda:N")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices): "
            "give --device cpu, or check the driver and the torch build"
        )
    return torch.device("cuda", int(index or 0))


def compute_on(device: torch.device) -> None:
    """Make a CUDA device this process's current one, and products of float32 exact on it.

    Triton launches on the current device, wherever tensors are. The sweep and the search of scales
    want float32, which the environment may have turned into TF32
    (``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``, as NVIDIA's containers set it).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
