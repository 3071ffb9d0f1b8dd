import pytest
from maca_serve.common.errors import UserError
from maca_serve.doctor.layouts import Inputs
from maca_serve.doctor.schemes import scheme_finder

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None, "symmetric": True}


def compressed(groups, ignore=()):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": list(ignore),
        "config_groups": groups,
    }


def test_class_name_and_ignore():
    groups = {"a": {"targets": ["Linear"], "weights": W4}}
    find = scheme_finder(compressed(groups, ["lm_head", "re:.*vision.*"]))
    assert find("model.layers.0.mlp.up_proj").group_size == 64
    assert find("lm_head") is None
    assert find("model.vision.fc1") is None


def test_names_go_before_classes():
    groups = {
        "a": {"targets": ["Linear"], "weights": W4},
        "b": {"targets": ["re:.*down_proj"], "weights": W8, "format": "int-quantized"},
    }
    find = scheme_finder(compressed(groups))
    assert (find("x.down_proj").bits, find("x.down_proj").format) == (8, "int-quantized")
    assert (find("x.up_proj").bits, find("x.up_proj").format) == (4, "pack-quantized")


def test_groups_of_other_names_only():
    find = scheme_finder(compressed({"a": {"targets": ["re:.*down_proj"], "weights": W4}}))
    assert find("x.up_proj") is None


def test_static_activations():
    inputs = {"num_bits": 8, "dynamic": False, "symmetric": False}
    group = {"targets": ["Linear"], "weights": W8, "input_activations": inputs}
    found = scheme_finder(compressed({"a": group}))("x").inputs
    assert found == Inputs(8, "int", "tensor", symmetric=False, static=True)


def test_activations_rounded_while_it_runs():
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    groups = {
        "a": {"targets": ["re:.*up"], "weights": W8, "input_activations": inputs},
        "b": {"targets": ["Linear"], "weights": W4, "input_activations": None},
    }
    find = scheme_finder(compressed(groups))
    assert find("up").inputs == Inputs(8, "float", "token", symmetric=True, static=False)
    assert find("down").inputs is None


@pytest.mark.parametrize(
    ("config", "form", "symmetric"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "gptq", True),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}, "gptq", False),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True},
            "awq",
            False,
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, "awq", True),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}, "gptq", True),
        (
            {
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": 128,
                "packing_format": "auto_round:auto_awq",
            },
            "awq",
            True,
        ),
    ],
)
def test_formats_of_others(config, form, symmetric):
    scheme = scheme_finder(config)("model.layers.0.mlp.up_proj")
    assert (scheme.format, scheme.bits, scheme.group_size) == (form, 4, 128)
    assert scheme.symmetric is symmetric


def test_overrides_by_module():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    dynamic = {"+:.*down_proj": {"bits": 8, "group_size": -1}, "-:.*up_proj": {}}
    find = scheme_finder(config | {"dynamic": dynamic})
    assert (find("x.down_proj").bits, find("x.down_proj").group_size) == (8, None)
    assert find("x.up_proj") is None
    assert find("x.gate_proj").bits == 4
    extra = {"extra_config": {"lm_head": {"bits": 16}}}
    assert scheme_finder({**config, "quant_method": "auto-round"} | extra)("lm_head") is None


def test_skipped_modules_of_awq_are_parts_of_names():
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    find = scheme_finder(config | {"modules_to_not_convert": ["visual"]})
    assert find("model.visual.fc1") is None
    assert find("model.fc1") is not None


@pytest.mark.parametrize("method", ["fp8", "modelopt", "hqq"])
def test_methods_that_are_not_known(method):
    assert scheme_finder({"quant_method": method, "bits": 4}) is None


def test_autoround_in_formats_that_are_not_known():
    config = {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:fp8"}
    assert scheme_finder(config | {"group_size": 32}) is None


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "compressed-tensors"},
        {"quant_method": "gptq", "group_size": 128},
        {"quant_method": "awq", "bits": "four", "group_size": 128},
    ],
)
def test_configs_that_lack_something(config):
    with pytest.raises(UserError, match=r"quantization_config: not a .* config"):
        scheme_finder(config)
