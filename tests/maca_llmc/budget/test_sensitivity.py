"""Costs of rounding against the divergence that it makes."""

import torch
from compressed_tensors.quantization import QuantizationArgs
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from maca_llmc.budget.parts import Part
from maca_llmc.budget.rounding import squared_errors
from maca_llmc.budget.sensitivity import cost, watch

NAME = "model.layers.1.mlp.down_proj"
W3 = QuantizationArgs(num_bits=3, type="int", symmetric=False, strategy="group", group_size=16)


def test_moments_are_means_over_windows_without_first_tokens(tmp_path):
    folder = save_tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = model.get_submodule(NAME)
    windows = [torch.randint(3, 60, (length,)) for length in (8, 8, 20)]
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    expected = torch.stack([x[0, 1:].square().mean(0) for x in seen]).mean(0)
    part = Part((NAME,), ((linear.out_features, linear.in_features),))
    moments = watch(model, [part], windows, 16, seed=0)[NAME]
    torch.testing.assert_close(moments.inputs, expected, rtol=1e-4, atol=1e-7)
    assert (moments.gradients > 0).all() and not linear._forward_hooks


def test_errors_are_those_of_the_nearest_codes_and_cost_weighs_them(tmp_path):
    weight = torch.randn(4, 32, dtype=torch.float64).float()
    errors = squared_errors(weight, W3, torch.ones(32))
    for row, own in zip(weight, errors, strict=True):
        for group, found in zip(row.split(16), own.split(16), strict=True):
            widest = (group.max().clamp_min(0) - group.min().clamp_max(0)) / 7
            assert found.sum() <= 16 * (widest / 2) ** 2 + 1e-6
    exact = torch.linspace(-3, 4, 8).repeat(4, 2)
    assert squared_errors(exact, W3, torch.ones(16)).max() < 1e-10

    class Known:
        inputs, gradients = torch.arange(32.0), torch.arange(4.0)

    by_hand = sum(
        float(Known.gradients[r] * Known.inputs[c] * errors_of(weight)[r, c]) / 2
        for r in range(4)
        for c in range(32)
    )
    assert abs(cost(weight, W3, Known) - by_hand) < 1e-4 * by_hand
    assert cost(weight, None, Known) == 0


def errors_of(weight):
    return squared_errors(weight, W3, torch.arange(32.0))
