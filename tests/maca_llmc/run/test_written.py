"""What is written is what was computed, and nothing that nothing computed."""

import pytest
import torch
from checkpoints import quantize
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from maca_llmc import MaCaModifier
from maca_llmc.common.errors import CalibrationError, UserError
from maca_llmc.model import loading
from maca_llmc.run import quantize_run, written
from maca_llmc.run.written import Sample, check_roundtrip, check_set, check_written, mark_unset

SHAPE = {"num_hidden_layers": 1}
MACA = "a_stage: {b_modifiers: {MaCaModifier: {ignore: [lm_head], %s}}}"
INT4 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}"
GROUP = f"config_groups: {{g: {{targets: [Linear], weights: {INT4}}}}}"


def scheme(**weights):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


# schemes, before anything is calibrated


@pytest.mark.parametrize("name", [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"])
def test_presets_are_written_with_what_was_computed(name):
    check_roundtrip("g", preset_name_to_scheme(name, ["Linear"]))


@pytest.mark.parametrize("strategy", ["group", "tensor_group"])
@pytest.mark.parametrize("size", [16, 32])
def test_float_4_bit_scales_that_would_be_rounded_once_more_are_refused(strategy, size):
    args = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
    with pytest.raises(CalibrationError, match=r"recipe's g would .* other values .* scale_dtype"):
        check_roundtrip("g", scheme(**args))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"num_bits": 4, "type": "float", "strategy": "channel"}, r"cannot be written \(Only num"),
        ({"num_bits": 4, "strategy": "tensor_group", "group_size": 32}, "other values"),
    ],
)
def test_schemes_that_nothing_writes_are_refused_in_one_line(weights, says):
    with pytest.raises(CalibrationError, match=says) as caught:
        check_roundtrip("g", scheme(**weights))
    assert "\n" not in str(caught.value)


# scales that nothing set


def test_scales_start_as_nan_and_are_found_so():
    model = loading.meta_model(tiny_config("llama", **SHAPE)).to_empty(device="cpu")
    MaCaModifier(scheme="W8A8", ignore=["lm_head"]).initialize_quantization(model)
    mark_unset(model)
    with pytest.raises(CalibrationError, match=r"^whole\.model\.layers\.0\.self_attn\.q_proj\.wei"):
        check_set(model, "whole.")
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.fill_(1.0)
    check_set(model)


@pytest.mark.parametrize("modifier", ["MaCaModifier", "GPTQModifier", "QuantizationModifier"])
def test_an_input_scale_that_no_token_reached_is_refused(
    tiny_models, tmp_path, monkeypatch, modifier
):
    """Before, it was written as the memory was."""
    from llmcompressor.modifiers.quantization.quantization import mixin

    original = mixin.calibrate_input_hook

    def but_one(module, args):
        if module.weight.shape != (64, 96):  # the down projection
            original(module, args)

    monkeypatch.setattr(mixin, "calibrate_input_hook", but_one)
    recipe = tmp_path / "recipe.yaml"
    inputs = "input_activations: {num_bits: 8, type: float, strategy: tensor, dynamic: false}"
    weights = "weights: {num_bits: 8, type: float, strategy: tensor}"
    groups = f"config_groups: {{g: {{targets: [Linear], {weights}, {inputs}}}}}"
    recipe.write_text((MACA % groups).replace("MaCaModifier", modifier))
    with pytest.raises(UserError, match=r"down_proj\.input_scale is not finite: no calibration"):
        quantize(tiny_models("llama", **SHAPE), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


# the checkpoint


@pytest.fixture
def checked(monkeypatch):
    """What each run checked: the model, the folder and the samples, from before and after."""
    seen = []
    original = quantize_run.check_written

    def check(model, folder, samples):
        original(model, folder, samples)
        seen.append((model, {f.name: load_file(f) for f in folder.glob("*.safetensors")}, samples))

    monkeypatch.setattr(quantize_run, "check_written", check)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_a_weight_of_each_kind_is_read_back(tiny_models, tmp_path, checked, family):
    quantize(tiny_models(family, **SHAPE), tmp_path / "out")
    (model, files, samples), kinds = checked[0], {"q", "k", "v", "o", "gate", "up", "down"}
    assert {sample.name.rpartition(".")[2].removesuffix("_proj") for sample in samples} == kinds
    folder = tmp_path / "changed"
    folder.mkdir()
    (name, tensors) = next(iter(files.items()))
    for key in [key for key in tensors if key.endswith("down_proj.weight_scale")]:
        tensors[key] = tensors[key] * 1.1
    save_file(tensors, folder / name)
    with pytest.raises(UserError, match=r"down_proj was not written with the values that were"):
        check_written(model, folder, samples)


def test_a_tensor_that_is_not_finite_is_refused(tiny_models, tmp_path, checked):
    quantize(tiny_models("llama", **SHAPE), tmp_path / "out")
    model, files, samples = checked[0]
    tensors = files["model.safetensors"]
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"^model\.norm\.weight is not finite"):
        check_written(model, tmp_path, samples)


def test_a_run_whose_compressor_changes_values_leaves_no_checkpoint(
    tiny_models, tmp_path, monkeypatch
):
    pack = BaseCompressor.get_value_from_registry("pack-quantized")
    original = pack.compress.__func__

    def compress(cls, state, scheme):
        return original(cls, state | {"weight_scale": state["weight_scale"] * 1.1}, scheme)

    monkeypatch.setattr(written, "check_roundtrip", lambda name, scheme: None)
    monkeypatch.setattr("maca_llmc.recipe.schemes.check_roundtrip", lambda name, scheme: None)
    monkeypatch.setattr(pack, "compress", classmethod(compress))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MACA % GROUP)
    with pytest.raises(UserError, match="q_proj was not written with the values"):
        quantize(tiny_models("llama", **SHAPE), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_widened_containers_are_held_to_the_narrow_codes(tiny_models, tmp_path, checked):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MACA % GROUP.replace("num_bits: 4", "num_bits: 3"))
    quantize(tiny_models("llama", **SHAPE), tmp_path / "out", recipe, container=4)
    assert len(checked[0][2]) == 7


def test_rows_of_a_sample_are_spread():
    weight = torch.arange(1000.0)[:, None].expand(1000, 4).contiguous()
    sample = Sample.of("a", weight)
    assert len(sample.rows) <= 256 and sample.rows[-1, 0] > 700
    assert sample.matches(weight) and not sample.matches(weight[:500])
    assert not sample.matches(weight * torch.nan)
