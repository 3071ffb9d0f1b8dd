"""A Linear of integer codes whose scales are learned."""

from typing import Any

import torch
from torch.nn.functional import linear

from maca_llmc.tuning.integers import IntegerWeight


class ScaledLinear(torch.nn.Module):
    """``y = x W^T + b`` with ``W = (q - z) s exp(log_factor)``; codes stay 8 bits wide in memory.

    The product is taken in the dtype of the input. What is trained is what is stored: scales are
    rounded to their dtype, and gradients pass that rounding as they are.

    :param weight: the integer weight
    :param bias: of the Linear that this replaces
    """

    def __init__(self, weight: IntegerWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.integer = weight
        self.bias = bias
        self.log_factor = torch.nn.Parameter(torch.zeros_like(weight.scale, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x`` ``[..., columns]``."""
        product = _Product.apply(x, self.log_factor, self.integer)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """The product; the weight is computed again for the backward pass instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, log_factor: torch.Tensor, integer: IntegerWeight
    ) -> torch.Tensor:
        ctx.save_for_backward(x, log_factor)
        ctx.integer = integer
        return linear(x, integer.dequantized(log_factor).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        x, log_factor = ctx.saved_tensors
        weight = ctx.integer.dequantized(log_factor)
        of_output = outer[0].flatten(0, -2)
        of_x = outer[0] @ weight.to(x.dtype)
        of_weight = (of_output.t() @ x.flatten(0, -2)).float()
        return of_x, ctx.integer.scale_gradient(of_weight, weight), None
