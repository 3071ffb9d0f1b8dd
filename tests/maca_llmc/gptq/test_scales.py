"""The search for scales, against a brute force over every group in float64."""

import math

import pytest
import torch
from checkpoints import load, quantize
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range
from safetensors.torch import load_file
from tiny import save_tiny_model

from maca_llmc.gptq import scales as scales_module
from maca_llmc.gptq.scales import _Cost, are_searched, column_costs, search_scales
from maca_llmc.gptq.solve import factorize

ROWS, WIDTH = 20, 96
GRID = [1 - 0.025 * step for step in range(20)]
"""The search looks at a third of it first."""

W3 = QuantizationArgs(num_bits=3, strategy="group", group_size=32, symmetric=True)
SCHEMES = [
    W3,
    W3.model_copy(update={"symmetric": False}),
    QuantizationArgs(num_bits=4, strategy="channel", symmetric=True),
    QuantizationArgs(num_bits=8, strategy="group", group_size=32, symmetric=True),
]


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return (torch.randn(ROWS, WIDTH) * torch.rand(WIDTH)).bfloat16()


@pytest.fixture
def costs():
    torch.manual_seed(1)
    return torch.rand(WIDTH) ** 3 + 1e-3


@pytest.fixture(params=[1.0, 5.0], ids=["independent", "correlated"])
def energies(request, weight, costs):
    """``w H w^T`` where inputs are independent, and where what all weights share costs more."""
    return request.param * (weight.float().square() * costs).sum(dim=1)


def rounding_cost(values, costs, ratio, scale, zero_point, args):
    """Of one group, number by number; its error along the weights counts ``ratio`` times."""
    low, high = (int(v) for v in calculate_range(args, "cpu"))
    total = along = energy = 0.0
    for value, cost in zip(values.tolist(), costs.tolist(), strict=True):
        code = min(max(round(value / scale + zero_point), low), high)
        error = (code - zero_point) * scale - value
        total += cost * error**2
        along += cost * error * value
        energy += cost * value**2
    return total + (ratio - 1) * along**2 / energy


def every_scale(values, args):
    """Each scale that may be chosen for a group, with its zero point."""
    for shrink in GRID:
        scale, zero_point = calculate_qparams(values.min() * shrink, values.max() * shrink, args)
        yield float(scale), int(zero_point)
        if args.symmetric and args.num_bits <= 4:
            yield -float(scale), int(zero_point)


@pytest.mark.parametrize("args", SCHEMES, ids=lambda a: f"{a.num_bits}{a.strategy}{a.symmetric}")
def test_no_scale_costs_less(weight, costs, energies, args):
    scales, zero_points = search_scales(weight, costs, energies, args)
    size = args.group_size or weight.shape[1]
    assert scales.shape == zero_points.shape == (ROWS, WIDTH // size)
    assert scales.dtype == torch.bfloat16
    ratios = []
    for row in range(ROWS):
        ratio = float(energies[row] / (weight[row].float().square() * costs).sum())
        for group in range(WIDTH // size):
            columns = slice(group * size, (group + 1) * size)
            values, own = weight[row, columns], costs[columns]
            found = rounding_cost(
                values, own, ratio, float(scales[row, group]), int(zero_points[row, group]), args
            )
            least = min(
                rounding_cost(values, own, ratio, *each, args) for each in every_scale(values, args)
            )
            ratios.append(found / least)
    assert sum(ratios) / len(ratios) < 1.05
    assert sorted(ratios)[len(ratios) // 2] < 1.0001, "half of them are the very best"


def test_the_sign_gives_the_larger_side_the_code_more():
    weight = torch.tensor([[4.0] + [-3.0, 1.0] * 15 + [2.0]])
    energies = weight.square().sum(dim=1)
    scales, _ = search_scales(weight, torch.ones(32), energies, W3)
    assert scales.item() < 0, "codes -4 to 3 hold 4, and only upside down"
    mirrored, _ = search_scales(-weight, torch.ones(32), energies, W3)
    assert mirrored.item() == -scales.item()


def test_unsigned_scales_are_positive_and_the_best_of_those(weight, costs, energies):
    signed, _ = search_scales(weight, costs, energies, W3)
    unsigned, zero_points = search_scales(weight, costs, energies, W3, signed=False)
    assert (signed < 0).any() and (unsigned > 0).all() and not zero_points.any()
    cost = _Cost.of(weight.float().unflatten(1, (-1, 32)), costs.view(-1, 32), energies)
    kept = signed > 0
    assert torch.equal(cost(signed, zero_points, W3)[kept], cost(unsigned, zero_points, W3)[kept])


def test_a_group_of_zeros_has_a_scale():
    scales, zero_points = search_scales(torch.zeros(2, 64), torch.ones(64), torch.zeros(2), W3)
    assert scales.isfinite().all() and (scales != 0).all() and not zero_points.any()


def test_a_group_of_zeros_in_a_row_of_others_costs_nothing(weight, costs):
    energies = 100 * (weight.float().square() * costs).sum(dim=1)
    weight[:, 32:64] = 0
    cost = _Cost.of(weight.float().unflatten(1, (-1, 32)), costs.view(-1, 32), energies)
    found = cost(torch.full((ROWS, 3), 0.1), torch.zeros(ROWS, 3), W3)
    assert found.isfinite().all() and not found[:, 1].any() and found[:, [0, 2]].all()


@pytest.mark.parametrize(
    "args", SCHEMES[:3], ids=lambda a: f"{a.num_bits}{a.strategy}{a.symmetric}"
)
def test_what_shrinks_together_counts_by_what_it_costs_together(weight, costs, args):
    """Where inputs are correlated, clipping leaves more of the output."""
    own = (weight.float().square() * costs).sum(dim=1)

    def left(ratio):
        scales, zero_points = search_scales(weight, costs, ratio * own, args)
        rounded = fake_quantize(weight, scales, zero_points, args).float()
        return float(((rounded * weight.float() * costs).sum(dim=1) / own).mean())

    assert left(1.0) < left(30.0) - 0.01
    assert abs(left(30.0) - 1) < abs(left(1.0) - 1) / 2


@pytest.mark.parametrize("ordered", [False, True])
def test_costs_are_those_of_the_sweep(ordered):
    """``1 / U_jj^2`` is the variance of input j given those that come after it in the sweep."""
    torch.manual_seed(2)
    rows = torch.randn(200, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    hessian = rows.T @ rows
    factor = factorize(hessian, 0.0, ordered)
    costs = column_costs(factor.upper, factor.order)
    order = torch.arange(8) if factor.order is None else factor.order
    for place, column in enumerate(order.tolist()):
        later = order[place + 1 :]
        cross = hessian[column, later]
        rest = hessian[column, column] - cross @ torch.linalg.solve(hessian[later][:, later], cross)
        assert costs[column].item() == pytest.approx(rest.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("args", "searched"),
    [
        (W3, True),
        (QuantizationArgs(num_bits=8, strategy="channel"), True),
        (W3.model_copy(update={"observer": "memoryless_minmax"}), True),
        (W3.model_copy(update={"observer": "memoryless_mse"}), False),
        (QuantizationArgs(num_bits=8, strategy="tensor"), False),
        (QuantizationArgs(num_bits=8, type="float", strategy="channel"), False),
    ],
)
def test_which_schemes_are_searched(args, searched):
    assert are_searched(args) == searched


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_checkpoint_loads_with_the_scales_that_were_found(tmp_path, symmetric):
    base = save_tiny_model("llama", tmp_path / "base", num_hidden_layers=1)
    losses, models = {}, {}
    for searched in ("false", "true"):
        recipe = tmp_path / f"{searched}.yaml"
        recipe.write_text(
            f"a_stage: {{b_modifiers: {{MaCaModifier: {{ignore: [lm_head], hessian_scales: "
            f"{searched}, config_groups: {{group_0: {{targets: [Linear], weights: {{num_bits: 3, "
            f"strategy: group, group_size: 32, symmetric: {symmetric}}}}}}}}}}}}}"
        )
        folder = quantize(base, tmp_path / searched, recipe)
        models[searched] = load(folder, dequantize=True)
        original = dict(load(base).named_parameters())
        losses[searched] = math.fsum(
            float((p - original[n]).square().sum())
            for n, p in models[searched].named_parameters()
            if n in original
        )
    assert losses["true"] < losses["false"]
    state = load_file(tmp_path / "true" / "model.safetensors")
    negative = [n for n, t in state.items() if n.endswith("weight_scale") and (t < 0).any()]
    assert bool(negative) == symmetric


def test_how_many_weights_are_searched_together_changes_nothing(weight, costs, monkeypatch):
    energies = (weight.float().square() * costs).sum(dim=1)
    whole = search_scales(weight, costs, energies, W3)
    monkeypatch.setitem(scales_module.WEIGHTS_AT_ONCE, "cpu", 3 * WIDTH)
    parts = search_scales(weight, costs, energies, W3)
    assert all(map(torch.equal, whole, parts))
