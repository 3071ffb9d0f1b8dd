"""The reference holds the values that the checkpoint stores."""

import json

import pytest
import torch
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.formats.packing import unpack
from maca_serve.verification import reference
from maca_serve.verification.reference import NoReference, load_reference
from maca_serve.verification.rounding import RoundedLinear
from packed import quantization, weights_config, write_int8, write_packed
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    ("bits", "options"),
    [(3, {"symmetric": False, "shards": 2}), (2, {"group": None}), (4, {}), (8, {})],
)
def test_verify_reads_every_weight_bit_for_bit(tmp_path, bits, options):
    values = write_packed(tmp_path / "w", bits, **options)
    model = load_reference(open_checkpoint(tmp_path / "w"))
    assert model.dtype == torch.bfloat16
    for module, value in values.items():
        found = model.get_submodule(module).weight
        assert torch.equal(found.view(torch.int16), value.view(torch.int16)), module
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 202) and torch.isfinite(logits).all()


def test_scales_are_rounded_to_what_the_engine_computes_in(tmp_path):
    write_packed(tmp_path / "w", 4)
    file = tmp_path / "w" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name] = torch.full_like(tensors[name], 0.01, dtype=torch.float16)
    save_file(tensors, file, metadata={"format": "pt"})
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = load_reference(open_checkpoint(tmp_path / "w"), dtype)
        found[dtype] = model.get_submodule("model.layers.1.mlp.up_proj").weight
    codes = unpack(tensors[name.replace("scale", "packed")], 4, 80)
    in_bfloat16 = codes.bfloat16() * torch.tensor(0.01).bfloat16()
    assert torch.equal(found[torch.bfloat16], in_bfloat16)
    in_float16 = (codes.half() * torch.tensor(0.01).half()).bfloat16()
    assert torch.equal(found[torch.float16], in_float16)
    assert not torch.equal(in_float16, in_bfloat16)


def rotating(*locations):
    """A configuration's part that says where weights and activations are rotated."""
    apply = [{"targets": ["Linear"], "location": location} for location in locations]
    groups = {"u": {"type": "hadamard", "apply": apply}}
    return {"transform_config": {"config_groups": groups}}


def rounding(**changes):
    """A configuration whose activations are rounded as vLLM's kernels differ in."""
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", **changes}
    return quantization(weights_config(8), input_activations=inputs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_verify_rounds_activations_of_w8a8_as_vllm_does(tmp_path, symmetric):
    stored = write_int8(tmp_path / "w", symmetric=symmetric)
    model = load_reference(open_checkpoint(tmp_path / "w"))
    for module, (codes, scale) in stored.items():
        found = model.get_submodule(module)
        assert isinstance(found, RoundedLinear) and found.inputs.symmetric is symmetric
        assert torch.equal(found.weight, codes.float() * scale.float()), module
    before = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    exact = model.float()(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert before.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert 0 < (before - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes is not dequantized here"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            "holds codes and quantization_config does not say how",
        ),
        (rounding(type="float"), "8-bit float, dynamic per token: what they are rounded to hangs"),
        (rounding(dynamic=False, strategy="tensor"), "8-bit int, static per tensor"),
        (rounding(num_bits=4), "4-bit int, dynamic per token"),
        (
            quantization(weights_config(4), format="nvfp4-pack-quantized"),
            "nvfp4-pack-quantized is not deq",
        ),
        (
            quantization(weights_config(3)) | {"kv_cache_scheme": {"num_bits": 8}},
            "its KV cache is quantized",
        ),
        (
            quantization(weights_config(3)) | rotating("weight_input", "input"),
            "rotates activations while it runs",
        ),
    ],
)
def test_verify_says_why_it_has_no_reference(tmp_path, config, says):
    write_packed(tmp_path / "w", 3)
    _change(tmp_path / "w", quantization_config=config)
    with pytest.raises(NoReference, match=says):
        load_reference(open_checkpoint(tmp_path / "w"))


def test_rotations_merged_into_weights_are_in_the_values_already(tmp_path):
    values = write_packed(tmp_path / "w", 3)
    expected = load_reference(open_checkpoint(tmp_path / "w")).state_dict()
    config = quantization(weights_config(3)) | rotating("weight_input", "weight_output")
    _change(tmp_path / "w", quantization_config=config)
    found = load_reference(open_checkpoint(tmp_path / "w")).state_dict()
    assert values and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_verify_wants_memory_and_a_model_that_transformers_knows(tmp_path, monkeypatch):
    write_packed(tmp_path / "w", 3)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "available_memory", lambda: 1000)
        with pytest.raises(NoReference, match=r"takes 0\.0 GiB of memory and 0\.0 GiB are free"):
            load_reference(open_checkpoint(tmp_path / "w"))
    _change(tmp_path / "w", num_hidden_layers=3)
    with pytest.raises(NoReference, match=r"cannot load it: no weight for model\.layers\.2"):
        load_reference(open_checkpoint(tmp_path / "w"))
    _change(tmp_path / "w", model_type="nobody-knows")
    with pytest.raises(NoReference, match=r"transformers cannot load it: .*nobody-knows"):
        load_reference(open_checkpoint(tmp_path / "w"))


def _change(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
