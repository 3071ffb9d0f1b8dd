"""The device that llm-compressor is to compute on."""

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
