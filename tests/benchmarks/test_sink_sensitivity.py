"""What an error at a token costs, against the divergence it makes."""

import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor", reason="runs in the quantize environment")

from sink_sensitivity import by_third, squared_gradients
from tiny import tiny_config

MODULE = "model.layers.0.mlp.down_proj"


def cost(model, tokens, place, size=1e-3):
    """Twice the divergence by an error at one token over its square, summed over directions."""
    width = model.config.hidden_size
    with torch.no_grad():
        base = model(tokens[None]).logits[0].log_softmax(-1)
        total = 0.0
        for axis in range(width):
            error = torch.zeros(1, len(tokens), width, dtype=torch.double)
            error[0, place, axis] = size
            module = model.get_submodule(MODULE)
            with module.register_forward_hook(lambda _, __, output, error=error: output + error):
                other = model(tokens[None]).logits[0].log_softmax(-1)
            total += 2 * float((base.exp() * (base - other)).sum()) / size**2
    return total


def test_squared_gradients_say_what_small_errors_cost():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).double().eval()
    model.lm_head.weight.data *= 20  # as drawn, all tokens are as good as equally likely
    tokens = torch.randint(0, 100, (6,))
    costs = [cost(model, tokens, place) for place in range(len(tokens))]
    drawn = squared_gradients(model, [tokens] * 800)[MODULE]
    assert {count for _, _, count in drawn} == {len(tokens)}
    assert statistics.fmean(first for first, _, _ in drawn) == pytest.approx(costs[0], rel=0.1)
    assert statistics.fmean(whole for _, whole, _ in drawn) == pytest.approx(sum(costs), rel=0.1)


def test_ratios_are_medians_over_thirds_of_the_layers():
    found = {f"layers.{n}.up_proj": [(2.0 * n, 8.0, 4), (0.0, 4.0, 2)] for n in range(6)}
    assert by_third(found) == {"up_proj": pytest.approx([0.25, 1.25, 2.25])}
