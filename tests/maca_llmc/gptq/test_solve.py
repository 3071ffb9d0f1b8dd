"""The solve against GPTQ written out in float64, and against llm-compressor's own."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import gptq_block_update, quantize_weight
from sweeping import update_of

from maca_llmc.gptq.solve import NotPositiveDefiniteError, factorize, sweep


def hessian_of(width, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * width, width, generator=generator)
    rows *= torch.linspace(0.2, 3, width)[torch.randperm(width, generator=generator)]
    rows[:, list(dead)] = 0
    return rows.T @ rows / len(rows)


def brute_force(weight, hessian, scale, dampening, order):
    """GPTQ column by column in float64, the inverse Hessian downdated as in OBQ."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += dampening * hessian.diagonal().mean() * torch.eye(len(hessian))
    left = list(order)
    inverse = torch.linalg.inv(hessian)
    loss = torch.zeros(len(weight), dtype=torch.float64)
    result = torch.zeros_like(weight)
    while left:
        column = left.pop(0)
        quantized = (weight[:, column] / scale).round().clamp(-8, 7) * scale
        error = (weight[:, column] - quantized) / inverse[column, column]
        loss += (weight[:, column] - quantized) ** 2 / inverse[column, column] / 2
        weight -= error[:, None] * inverse[column][None]
        result[:, column] = quantized
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result, loss


CHANNEL = QuantizationArgs(num_bits=4, strategy="channel", symmetric=True)


@pytest.mark.parametrize("ordered", [False, True])
def test_codes_and_losses_are_those_of_gptq_written_out(ordered):
    torch.manual_seed(1)
    weight, hessian = torch.randn(24, 40), hessian_of(40)
    scale = weight.abs().amax(1, keepdim=True) / 7.3
    factor = factorize(hessian, 0.01, ordered)
    quantized, losses = sweep(
        weight.clone()[None], [factor], update_of(gptq_block_update, scale[None], CHANNEL), 16
    )
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(40)
    expected, loss = brute_force(weight, hessian, scale[:, 0].double(), 0.01, order.tolist())
    assert (quantized[0] - expected).abs().amax() < 1e-5
    assert torch.allclose(losses[0].double(), loss, rtol=1e-4)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dead", [(), (3, 17)])
@pytest.mark.parametrize("batch", [1, 3])
def test_bits_are_those_of_llm_compressor(ordered, dead, batch):
    torch.manual_seed(2)
    weights = torch.randn(batch, 24, 96)
    hessians = torch.stack([hessian_of(96, seed, dead) for seed in range(batch)])
    scale = weights.abs().amax(2, keepdim=True) / 7.3
    args = CHANNEL.model_copy(update={"actorder": "static" if ordered else None})
    stock, stock_losses, failed = quantize_weight(
        weights=weights.clone(),
        hessians=hessians.clone(),
        scale=scale,
        zero_point=torch.zeros_like(scale),
        global_scale=None,
        quant_args=args,
        blocksize=32,
    )
    assert not failed.any()
    factors = [factorize(hessian, 0.01, ordered) for hessian in hessians]
    ours, losses = sweep(weights.clone(), factors, update_of(gptq_block_update, scale, args), 32)
    assert torch.equal(ours, stock)
    assert torch.equal(losses.sum(1), stock_losses)


def test_rows_do_not_depend_on_what_they_are_stacked_with():
    torch.manual_seed(3)
    weight, hessian = torch.randn(300, 96), hessian_of(96)
    scale = weight.abs().amax(1, keepdim=True) / 7.3
    factor = factorize(hessian, 0.01, True)

    def solve(rows):
        update = update_of(gptq_block_update, scale[rows][None], CHANNEL)
        return sweep(weight[rows].clone()[None], [factor], update, 32)[0][0]

    whole = solve(slice(0, 300))
    parts = torch.cat([solve(slice(0, 64)), solve(slice(64, 100)), solve(slice(100, 300))])
    assert torch.equal(whole, parts)


def test_the_hessian_is_left_as_it_was():
    hessian = hessian_of(16)
    before = hessian.clone()
    factorize(hessian, 0.01, False)
    assert torch.equal(hessian, before)


def test_dampening_rises_until_the_hessian_can_be_factorised():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05
    factor = factorize(hessian, 0.01, True)
    assert factor.dampening == pytest.approx(0.1)
    expected = torch.linalg.inv((hessian + 0.1 * torch.eye(8)).double())
    order = factor.order
    found = (factor.upper.T @ factor.upper).double()
    assert torch.allclose(found, expected[order][:, order], rtol=1e-4, atol=1e-6)


def test_a_hessian_beyond_help_is_refused():
    with pytest.raises(NotPositiveDefiniteError, match="with dampening 1"):
        factorize(-torch.eye(4), 0.01, False)
