"""GPTAQ's sweep, against least squares written out in float64."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from sweeping import update_of

from maca_llmc.gptq import gptaq
from maca_llmc.gptq.gptaq import asymmetric_block_update, eager_sweep_block, feedback
from maca_llmc.gptq.hessian import add_cross
from maca_llmc.gptq.solve import factorize, sweep

CHANNEL = QuantizationArgs(num_bits=3, strategy="channel", symmetric=True)
WIDTH, ROWS = 40, 24


@pytest.fixture
def inputs():
    """Rows of the quantized model and of the unquantized one, of channels unlike each other."""
    torch.manual_seed(0)
    spread = torch.linspace(0.2, 3, WIDTH)[torch.randperm(WIDTH)]
    mixing = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    quantized = torch.randn(4 * WIDTH, WIDTH) @ mixing * spread
    full = quantized + 0.3 * quantized @ mixing + 0.1 * torch.randn_like(quantized) * spread
    return quantized, full


def moments(quantized, full):
    return quantized.T @ quantized, (full - quantized).T @ quantized


def round_to(values, scale):
    return (values / scale).round().clamp(-4, 3) * scale


def brute_force(weight, scale, quantized, full, order, dampening, alpha):
    """Column by column: the later ones take over, by least squares, what this one leaves."""
    weight, scale = weight.double().clone(), scale.double()
    quantized, full = quantized.double(), full.double()
    own = quantized.T @ quantized
    damping = dampening * own.diagonal().mean()
    result = torch.zeros_like(weight)
    for place, column in enumerate(order):
        before = weight[:, column].clone()
        result[:, column] = round_to(before, scale)
        later = order[place + 1 :]
        if not later:
            break
        change = alpha * (full - quantized)[:, column]
        left = torch.outer(before - result[:, column], quantized[:, column])
        left += torch.outer(before, change)
        wanted = left @ quantized[:, later]
        against = own[later][:, later] + damping * torch.eye(len(later), dtype=torch.float64)
        weight[:, later] += torch.linalg.solve(against, wanted.T).T
    return result


def solve(weight, scale, hessian, cross, alpha, *, ordered=True, block_size=16, dampening=0.01):
    factor = factorize(hessian, dampening, ordered)
    feeds = feedback(cross, factor, alpha)[None]
    return sweep(
        weight.clone()[None],
        [factor],
        update_of(asymmetric_block_update, scale[None], CHANNEL),
        block_size,
        feeds,
    )[0][0]


@pytest.fixture
def weight():
    torch.manual_seed(1)
    return torch.randn(ROWS, WIDTH)


@pytest.fixture
def scale(weight):
    return weight.abs().amax(1, keepdim=True) / 3.3


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_codes_are_those_of_least_squares(
    inputs, weight, scale, ordered, alpha, eager, monkeypatch
):
    if eager:
        monkeypatch.setattr(gptaq, "sweep_block", eager_sweep_block)
    hessian, cross = moments(*inputs)
    found = solve(weight, scale, hessian, cross, alpha, ordered=ordered)
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(WIDTH)
    expected = brute_force(weight, scale[:, 0], *inputs, order.tolist(), 0.01, alpha)
    assert (found - expected).abs().amax() < 1e-4


def test_the_block_size_changes_nothing(inputs, weight, scale):
    hessian, cross = moments(*inputs)
    several = [solve(weight, scale, hessian, cross, 1.0, block_size=n) for n in (1, 7, 16, WIDTH)]
    assert all((other - several[0]).abs().amax() < 1e-4 for other in several[1:])


def test_alpha_zero_is_gptq(inputs, weight, scale):
    hessian, cross = moments(*inputs)
    factor = factorize(hessian, 0.01, True)

    def plain(*tensors, i1):
        update_of(asymmetric_block_update, scale[None], CHANNEL)(
            *tensors, i1=i1, feed=torch.zeros(1, WIDTH, WIDTH)
        )

    expected = sweep(weight.clone()[None], [factor], plain, 16)[0][0]
    assert torch.equal(solve(weight, scale, hessian, cross, 0.0), expected)


def test_the_output_is_nearer_to_that_of_the_full_inputs(inputs, weight, scale):
    quantized, full = inputs
    hessian, cross = moments(*inputs)

    def distance(alpha):
        found = solve(weight, scale, hessian, cross, alpha)
        return float((quantized @ found.T - full @ weight.T).norm())

    assert distance(1.0) < 0.9 * distance(0.0)
    assert distance(1.0) < distance(0.5) < distance(0.0)


def test_dead_columns_feed_nothing(inputs, weight, scale):
    quantized, full = (rows.clone() for rows in inputs)
    quantized[:, [3, 17]] = 0
    hessian, cross = moments(quantized, full)
    factor = factorize(hessian, 0.01, True)
    feeds = feedback(cross, factor, 1.0)
    dead = factor.dead.nonzero()[:, 0]
    assert len(dead) == 2 and not feeds[dead].any() and feeds.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_moments_add_up(inputs, dtype):
    quantized, full = (rows.to(dtype) for rows in inputs)
    cross = torch.zeros(WIDTH, WIDTH)
    add_cross(cross, full, quantized, 0.25)
    add_cross(cross, full[:5], quantized[:5], 2.0)
    difference = full.double() - quantized.double()
    expected = 0.5 * difference.T @ quantized.double()
    expected += 4.0 * difference[:5].T @ quantized[:5].double()
    assert torch.linalg.norm(cross - expected) < 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_sweep_is_the_eager_one(zero_points, dtype):
    torch.manual_seed(3)
    rows, width = 70, 24
    block, factor = (
        torch.randn(rows, width),
        torch.randn(width, width).triu() + 4 * torch.eye(width),
    )
    feed = 0.1 * torch.randn(width, width).triu(1)
    scale = (torch.rand(rows, width) + 0.1).to(dtype)
    shift = torch.randint(-4, 4, (rows, width)).float() if zero_points else None
    results = []
    for sweep_once in (gptaq.sweep_block, eager_sweep_block):
        work, quantized, errors = block.clone(), torch.empty(rows, width), torch.empty(rows, width)
        sweep_once(work, factor, scale, shift, (-4.0, 3.0), quantized, errors, feed)
        results.append((work, quantized, errors))
    for compiled, eager in zip(*results, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-4)
