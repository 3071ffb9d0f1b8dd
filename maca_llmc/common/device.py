"""The device to compute on, and how it multiplies."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from maca_llmc.common.errors import UserError


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
        # Sets torch's newer setting as well; setting only that one leaves the two in conflict.
        torch.backends.cuda.matmul.allow_tf32 = False


def _slow_bfloat16(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 there number by number, at a sixth of float32's speed."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def product_dtype(device: torch.device) -> torch.dtype:
    """What products are fastest in."""
    return torch.float32 if _slow_bfloat16(device) else torch.bfloat16


def fast_linears(device: torch.device) -> AbstractContextManager[Any]:
    """While open, Linears of bfloat16 models do not wait for a CPU that multiplies them slowly.

    Where torch has AVX2 only it multiplies bfloat16 number by number, at a sixth of the speed of
    float32 (seen in 2.13.0+cpu). There the product is taken in float32 and rounded once, which is
    what units for bfloat16 do, too. Anywhere else nothing changes.
    """
    return Float32Linears() if _slow_bfloat16(device) else nullcontext()


class Float32Linears(TorchFunctionMode):
    """Every Linear of bfloat16 is a product of float32 copies, rounded to bfloat16."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of any function of its own."""
        return (_rounded_linear if function is linear else function)(*args, **(kwargs or {}))


def _rounded_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if input.dtype != torch.bfloat16:
        return linear(input, weight, bias)
    product = linear(input.float(), weight.float(), None if bias is None else bias.float())
    return product.to(input.dtype)
