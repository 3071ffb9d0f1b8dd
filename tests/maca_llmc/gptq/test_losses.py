"""Recorded losses against float64, from the weights before and after and the Hessian itself."""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import base as gptq_base
from tiny import loader, random_sequences
from watching import hessians_of, linears

from maca_llmc import MaCaModifier
from maca_llmc.gptq.losses import recorded_losses


def test_recorded_losses_are_relative_output_errors(tiny_model):
    model = tiny_model("llama", num_hidden_layers=1, intermediate_size=128)
    before = {name: module.weight.detach().double() for name, module in linears(model)}
    names = {module: name for name, module in linears(model)}
    hessians, losses = {}, {}

    class Watched(MaCaModifier):
        def compress_module_list(self, module_list):
            found = hessians_of(self, module_list)
            hessians.update({name: hessian.double() for name, hessian in found.items()})
            super().compress_module_list(module_list)

    fields = {"config_groups": groups(32), "ignore": ["lm_head"], "dampening_frac": 0.01}
    with recorded_losses(lambda m, loss: losses.update({names[m]: loss})):
        oneshot(model=model, dataset=loader(random_sequences((12, 7))), recipe=Watched(**fields))
    assert losses.keys() == hessians.keys() and len(losses) == 7
    for name, module in linears(model):
        if name == "lm_head":
            continue
        change, hessian = module.weight.detach().double() - before[name], hessians[name]
        dampening = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        expected = energy(change, hessian + dampening) / energy(before[name], hessian)
        assert losses[name] == pytest.approx(float(expected), rel=1e-3), name


def groups(size):
    weights = {"num_bits": 4, "strategy": "group", "group_size": size}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def energy(weight, hessian):
    return torch.trace(weight @ hessian @ weight.T)


def test_recorded_losses_stop_with_the_block():
    original = gptq_base.quantize_weight, gptq_base.CompressionLogger
    with recorded_losses(lambda module, loss: None):
        assert gptq_base.quantize_weight is not original[0]
    assert (gptq_base.quantize_weight, gptq_base.CompressionLogger) == original
