"""GPTAQ end to end: what stages see of the quantized and of the unquantized model."""

import pytest
import torch
from checkpoints import load
from llmcompressor import oneshot
from tiny import loader, random_sequences, save_tiny_model
from watching import SCHEME, linears

from maca_llmc import MaCaModifier
from maca_llmc.calibrate.full_precision import stages
from maca_llmc.gptq.hessian import mirror


def modules(count):
    return [torch.nn.Identity() for _ in range(count)]


def test_stages_are_inputs_in_the_order_of_calls():
    q, k, v, o, gate, up, down = modules(7)
    names = {q: "q", k: "k", v: "v", o: "o", gate: "gate", up: "up", down: "down"}
    inputs = {q: 0, k: 0, v: 0, o: 1, gate: 2, up: 2, down: 3}
    assert stages(inputs, names) == [[q, k, v], [o], [gate, up], [down]]


def test_the_same_projection_of_all_experts_is_one_stage():
    gates, ups, downs = modules(3), modules(3), modules(3)
    names = {}
    inputs = {}
    for i in range(3):
        for number, (kind, module) in enumerate(
            (("gate", gates[i]), ("up", ups[i]), ("down", downs[i]))
        ):
            names[module] = f"mlp.experts.{i}.{kind}_proj"
            inputs[module] = 0 if number < 2 else 1 + i
    found = stages(inputs, names)
    assert [set(stage) for stage in found] == [{*gates, *ups}, set(downs)]


def inputs_of(model, sequences):
    """What each Linear of a model receives, by name, one after the other."""
    received = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: received.setdefault(name, []).append(
                args[0].flatten(0, -2).double()
            )
        )
        for name, module in linears(model)
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None])
    for hook in hooks:
        hook.remove()
    return received


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_moments_are_those_of_both_models(family, exponent, tmp_path, monkeypatch):
    """Against inputs recorded in the unquantized model, and in the one that comes out.

    The one that comes out has, before each module, what the module saw when its turn came: only
    what is before it was quantized by then.
    """
    sequences = random_sequences([12, 30, 12])
    model = load(save_tiny_model(family, tmp_path))
    full = inputs_of(model, sequences)
    seen = {}
    original = MaCaModifier.compress_module_list

    def watched(self, firsts):
        for first in firsts:
            hessian = self._hessians[first].clone()
            mirror(hessian)
            for member in self._groups[first].members:
                name = self._module_names[member]
                seen[name] = hessian, self._groups[first].statistic.cross.clone()
        original(self, firsts)

    monkeypatch.setattr(MaCaModifier, "compress_module_list", watched)
    modifier = MaCaModifier(
        gptaq_alpha=1.0, length_exponent=exponent, first_token_weight=3.0, **SCHEME
    )
    oneshot(
        model=model,
        dataset=loader(sequences),
        recipe=modifier,
        pipeline="maca",
    )
    quantized = inputs_of(model, sequences)
    weights = []
    for sequence in sequences:
        weight = torch.full((len(sequence), 1), (len(sequence) / len(sequences[0])) ** -exponent)
        weight[0] *= 3.0
        weights.append(weight)
    assert len(seen) == len([n for n, _ in linears(model) if n != "lm_head"])
    for name, (hessian, cross) in seen.items():
        expected, difference = 0, 0
        for q, fp, weight in zip(quantized[name], full[name], weights, strict=True):
            expected = expected + 2 * (weight * q).T @ q
            difference = difference + 2 * (weight * (fp - q)).T @ q
        assert torch.linalg.norm(hessian - expected) < 1e-3 * torch.linalg.norm(expected), name
        error = torch.linalg.norm(cross - difference)
        assert error < 1e-3 * torch.linalg.norm(expected), name
    last = max(n for n in seen if n.endswith("down_proj"))
    assert torch.linalg.norm(seen[last][1]) > 1e-3 * torch.linalg.norm(seen[last][0])


def test_another_pipeline_is_refused(tmp_path):
    modifier = MaCaModifier(gptaq_alpha=1.0, **SCHEME)
    with pytest.raises(ValueError, match=r'which only our pipeline has: use .*pipeline="maca"'):
        oneshot(
            model=load(save_tiny_model("llama", tmp_path)),
            dataset=loader(random_sequences([16])),
            recipe=modifier,
            pipeline="sequential",
        )


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4A16"])
def test_schemes_without_a_sweep_are_refused(tmp_path, scheme):
    modifier = MaCaModifier(gptaq_alpha=1.0, scheme=scheme, ignore=["lm_head"])
    with pytest.raises(ValueError, match="gptaq_alpha: works for integers by group or channel"):
        oneshot(
            model=load(save_tiny_model("llama", tmp_path)),
            dataset=loader(random_sequences([16])),
            recipe=modifier,
            pipeline="maca",
        )
