"""Integer weights: what they stand for, and gradients of their scales."""

import pytest
import torch
from integers import integer_weight

from maca_llmc.tuning.integers import IntegerWeight
from maca_llmc.tuning.scaled_linear import ScaledLinear


def by_hand(weight: IntegerWeight, factor: torch.Tensor) -> torch.Tensor:
    """Entry by entry, in float64."""
    rows, columns = weight.codes.shape
    size = columns // weight.groups
    result = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            group = column // size
            zero = 0 if weight.zero_point is None else int(weight.zero_point[row, group])
            level = int(weight.codes[row, column]) - zero
            result[row, column] = level * weight.scale[row, group].double() * factor[row, group]
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_weight_is_code_less_zero_point_times_scale(symmetric, groups):
    weight = integer_weight(symmetric, groups)
    expected = by_hand(weight, torch.ones(5, groups))
    torch.testing.assert_close(weight.dequantized().double(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_gradient_against_finite_differences(symmetric):
    weight = integer_weight(symmetric)
    weight = IntegerWeight(weight.codes, weight.scale.float(), weight.zero_point)
    generator = torch.Generator().manual_seed(1)
    x, bias, outer = (torch.randn(*s, generator=generator) for s in ((2, 4, 12), (5,), (2, 4, 5)))
    linear = ScaledLinear(weight, bias)
    x.requires_grad_()
    (linear(x) * outer).sum().backward()

    def loss(log_factor, inputs):
        product = inputs.double() @ by_hand(weight, log_factor.exp()).T + bias
        return (product * outer).sum()

    zero = torch.zeros(5, 3, dtype=torch.float64)
    for row, group in ((0, 0), (1, 2), (4, 1)):
        shift = zero.clone()
        shift[row, group] = 1e-6
        expected = (loss(shift, x) - loss(-shift, x)) / 2e-6
        found = linear.log_factor.grad[row, group].double()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    of_x = torch.einsum("bto,oi->bti", outer.double(), by_hand(weight, zero.exp()))
    torch.testing.assert_close(x.grad.double(), of_x, rtol=1e-4, atol=1e-5)


def test_stored_scales_keep_sign_and_dtype_and_are_never_zero():
    weight = integer_weight(symmetric=True)
    for log_factor in (-300.0, -0.01, 0.0, 0.01):
        stored = weight.stored(torch.full((5, 3), log_factor))
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.sign(), weight.scale.sign())
    assert torch.equal(weight.stored(torch.zeros(5, 3)), weight.scale)


def test_limits_are_those_of_the_codes_in_use():
    assert integer_weight(symmetric=True).limits == (-4, 3)
