"""Linear layers that round their inputs while the model runs, as vLLM's int8 kernels do.

vLLM: `dynamic_scaled_int8_quant` (csrc/cpu/dnnl_kernels.cpp, csrc/quantization/w8a8/int8). Its
scales are not those of compressed-tensors, which divides by 127.5 where vLLM divides by 127.
"""

import torch
from torch import nn
from torch.nn import functional

from maca_serve.doctor.layouts import Inputs

LARGEST = 127
LOWEST = -128
# Below every scale that occurs: a token of zeros has none.
TINY = torch.finfo(torch.float32).tiny


class RoundedLinear(nn.Module):
    """`round(x) W^T + b`, computed in float32 whatever the dtype of x, which the result has.

    float32 holds the products of int8 codes exactly, as the kernels' int32 does; their sums are
    off by less than the result's own rounding.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, inputs: Inputs) -> None:
        """Take the weight, out x in, in float32; `can_round` must say yes to the inputs."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in] to outputs [..., out]."""
        rounded = round_tokens(x.float(), symmetric=self.inputs.symmetric)
        return functional.linear(rounded, self.weight, self.bias).to(x.dtype)


def can_round(inputs: Inputs) -> bool:
    """Whether these are int8 with a scale per token, found while the model runs.

    Of others it hangs on the kernel what they are rounded to: where vLLM fuses q, k and v it takes
    one stored scale for all, and its FP8 kernels for CPUs and older cards do not round inputs.
    """
    return (inputs.kind, inputs.bits, inputs.strategy) == ("int", 8, "token") and not inputs.static


def round_tokens(x: torch.Tensor, *, symmetric: bool) -> torch.Tensor:
    """Values that int8 codes with one scale per token stand for.

    Args:
        x: float32, [..., features].
        symmetric: codes round(x / s) with s = max|x| / 127; else round(x / s) + z with
            s = (max x - min x) / 255 and z = round(-128 - min x / s).
    """
    if symmetric:
        scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=TINY)
        return (x / scale).round().clamp(LOWEST, LARGEST) * scale
    least, most = x.aminmax(dim=-1, keepdim=True)
    scale = ((most - least) / (LARGEST - LOWEST)).clamp(min=TINY)
    zero = (LOWEST - least / scale).round()
    codes = ((x / scale).round() + zero).clamp(LOWEST, LARGEST)
    return (codes - zero) * scale
