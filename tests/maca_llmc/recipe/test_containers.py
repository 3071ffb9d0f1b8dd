"""2- and 3-bit codes in 4-bit containers: the same values, bit for bit."""

import json

import pytest
import torch
from checkpoints import load, quantization_config, quantize, tensors
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from maca_llmc.common.errors import UserError
from maca_llmc.recipe.containers import check_container, widen_containers

WEIGHTS = {
    "group": "strategy: group, group_size: 32, symmetric: true",
    "asymmetric": "strategy: group, group_size: 32, symmetric: false",
    "channel": "strategy: channel, symmetric: true",
}


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_values_are_the_same_bit_for_bit(tiny_models, tmp_path, bits, weights):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage: {b_modifiers: {MaCaModifier: {ignore: [lm_head], config_groups: {group_0: "
        f"{{targets: [Linear], weights: {{num_bits: {bits}, {WEIGHTS[weights]}}}}}}}}}}}}}"
    )
    source = tiny_models("llama", num_hidden_layers=1)
    plain = quantize(source, tmp_path / "plain", recipe)
    wide = quantize(source, tmp_path / "wide", recipe, container=4)

    def bits_of(folder):
        return quantization_config(folder)["config_groups"]["group_0"]["weights"]["num_bits"]

    assert (bits_of(plain), bits_of(wide)) == (bits, 4)
    record = json.loads((wide / "maca_run.json").read_text())
    assert record["container_bits"] == 4
    assert record["scheme"].startswith(f"W{bits}A16") and "in 4-bit containers" in record["scheme"]
    name = "model.layers.0.mlp.down_proj.weight_packed"
    assert tensors(wide)[name].numel() > tensors(plain)[name].numel()

    expected = load(plain, dequantize=True).state_dict()
    found = load(wide, dequantize=True).state_dict()
    quantized = [name for name in expected if "_proj.weight" in name and name in found]
    assert len([name for name in quantized if name.endswith("_proj.weight")]) == 7
    for name, value in expected.items():
        if name.endswith(".weight"):
            assert torch.equal(found[name], value), name
    levels = expected["model.layers.0.mlp.down_proj.weight"][0, :32].unique().numel()
    assert 1 < levels <= 2**bits


def scheme(bits):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=bits))


def test_only_narrow_modules_are_widened():
    """Those that share a scheme share the new one; the old one stays as it was."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    shared = scheme(3)
    for module, its in zip(model, (shared, shared, scheme(4)), strict=False):
        module.quantization_scheme = its
    assert widen_containers(model) == 2
    assert [module.quantization_scheme.weights.num_bits for module in model[:3]] == [4, 4, 4]
    assert model[0].quantization_scheme is model[1].quantization_scheme
    assert shared.weights.num_bits == 3 and not hasattr(model[3], "quantization_scheme")


def test_a_recipe_without_narrow_weights_is_refused():
    check_container([scheme(4), scheme(2)])
    activations_only = QuantizationScheme(targets=["Linear"])
    with pytest.raises(UserError, match="this recipe has none: drop it"):
        check_container([scheme(4), scheme(8), activations_only])
