import json

import pytest
from maca_serve.common.errors import UserError
from maca_serve.formats.checkpoint import (
    open_all,
    open_checkpoint,
    require_quantized,
    require_same_model,
)
from maca_serve.formats.schemes import describe_scheme

W8A8 = {
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
}
W4 = {"weights": {"num_bits": 4, "group_size": 128, "strategy": "group", "symmetric": False}}


FOUR = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed(**groups):
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"dtype": "bfloat16"}, "BF16"),
        ({"torch_dtype": "float16"}, "FP16"),
        ({"text_config": {"dtype": "bfloat16"}}, "BF16"),
        ({}, "unknown dtype"),
        (compressed(a=W8A8), "W8A8 int, channel, symmetric, dynamic activations per token"),
        (compressed(a=W4), "W4A16 int, group 128, asymmetric"),
        (compressed(a=W4, b=W4), "W4A16 int, group 128, asymmetric"),
        (
            compressed(a=W4, b=W8A8),
            "W4A16 int, group 128, asymmetric"
            " + W8A8 int, channel, symmetric, dynamic activations per token",
        ),
        (
            compressed(a={"weights": FOUR, "format": "mxfp4-pack-quantized"}),
            "W4A16 MXFP4 (scales are powers of two), group 32, symmetric",
        ),
        (compressed(a={"weights": FOUR}), "W4A16 float, group 32, symmetric"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            "gptq 4-bit, group 128",
        ),
    ],
)
def test_scheme(config, says):
    assert describe_scheme(config) == says


def test_what_a_folder_says(quantized):
    checkpoint = open_checkpoint(quantized)
    assert checkpoint.name == "w4"
    assert checkpoint.quantized
    assert checkpoint.context == 512
    assert checkpoint.size_bytes == 1000
    assert checkpoint.scheme == "W4A16 int, group 64, symmetric"
    assert checkpoint.run_record == {}
    require_quantized(checkpoint)


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("W3A16 int, group 64, symmetric", "W3A16 int, group 64, symmetric in 4-bit containers"),
        ("W3A16 int, in 4-bit containers", "W3A16 int, in 4-bit containers"),
    ],
)
def test_container_is_not_taken_for_the_scheme(quantized, scheme, says):
    record = {"scheme": scheme, "container_bits": 4}
    (quantized / "maca_run.json").write_text(json.dumps(record))
    assert open_checkpoint(quantized).scheme == says


def test_record_without_container_leaves_the_config_its_say(quantized):
    (quantized / "maca_run.json").write_text('{"scheme": "W4A16", "container_bits": null}')
    assert open_checkpoint(quantized).scheme == "W4A16 int, group 64, symmetric"


def test_base_is_not_quantized(base):
    with pytest.raises(UserError, match=r"base: not a quantized checkpoint"):
        require_quantized(open_checkpoint(base))


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "qwen3"), ("hidden_size", 128), ("num_hidden_layers", 3), ("vocab_size", 9)],
)
def test_a_base_of_another_model(make_checkpoint, key, value):
    base = open_checkpoint(make_checkpoint("base", quantized=False, vocab_size=7))
    require_same_model(base, open_checkpoint(make_checkpoint("same", vocab_size=7)), "BASE")
    require_same_model(base, open_checkpoint(make_checkpoint("silent", vocab_size=None)), "BASE")
    other = make_checkpoint("other", text_config={**base.config, key: value})
    says = rf"^BASE: .*base has {key} \w+ and .*other {value}; give the model that was quantized$"
    with pytest.raises(UserError, match=says):
        require_same_model(base, open_checkpoint(other), "BASE")


def test_folders_that_are_no_checkpoints(tmp_path, quantized):
    with pytest.raises(UserError, match="nope: no such folder"):
        open_checkpoint(tmp_path / "nope")
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    (quantized / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        open_checkpoint(quantized)
    (quantized / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        open_checkpoint(quantized)


def test_names(base, quantized):
    assert [c.name for c in open_all([base, quantized])] == ["base", "w4"]
    assert [c.name for c in open_all([base, quantized], ["a", "b"])] == ["a", "b"]
    with pytest.raises(UserError, match="1 names for 2"):
        open_all([base, quantized], ["a"])
    with pytest.raises(UserError, match="are both named 'w4'"):
        open_all([quantized, quantized])
    with pytest.raises(UserError, match="at least one"):
        open_all([])
