from pathlib import Path

import pytest
from maca_serve.doctor.checks import check, check_sizes, heads_misfit
from maca_serve.doctor.headers import Tensor

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}


def config(**weights):
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"a": group},
    }


def headers(**tensors):
    """`up__weight_packed=("I32", 8, 16)` is a tensor of the module `up`."""
    found = {}
    for name, (dtype, *shape) in tensors.items():
        name = name.replace("__", ".")
        found[name] = Tensor(name, dtype, tuple(shape), Path("unread"), 0, 0)
    return found


GOOD = {"up__weight_packed": ("I32", 8, 16), "up__weight_scale": ("BF16", 8, 2)}
# Without its values weight_shape is only asked to be there.
SIZE = {"up__weight_shape": ("I32", 2)}


def complaints(tensors, quantization):
    return [problem.what for problem in check(headers(**tensors), quantization).problems]


def test_a_good_module():
    contents = check(headers(**GOOD, **SIZE, norm__weight=("BF16", 128)), config())
    assert contents.problems == []
    assert contents.sizes == {"up": (8, 128)}
    assert contents.quantized == {"up"}


def test_plain_matrices_are_sized_and_not_quantized():
    contents = check(headers(lm_head__weight=("BF16", 100, 128)), config())
    assert contents.sizes == {"lm_head": (100, 128)}
    assert contents.quantized == set()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ({"up__weight_scale": ("BF16", 8, 3)}, "weight_scale is [8, 3], not [8, 2]"),
        ({"up__weight_scale": ("I32", 8, 2)}, "weight_scale is I32, not BF16 or F16 or F32"),
        ({"up__weight_packed": ("U8", 8, 16)}, "weight_packed is U8, not I32"),
        ({"up__weight_packed": ("I32", 8)}, "codes are not a matrix"),
        ({"up__weight_zero_point": ("I32", 1, 2)}, "the config says symmetric"),
    ],
)
def test_what_is_wrong_with_a_module(tensor, says):
    found = complaints({**GOOD, **SIZE, **tensor}, config())
    assert any(says in what for what in found), found


def test_one_scale_for_packed_codes_is_as_the_config_says():
    by_tensor = config(strategy="tensor", group_size=None)
    assert complaints({**GOOD, **SIZE, "up__weight_scale": ("BF16", 1)}, by_tensor) == []


def test_missing_tensors():
    assert complaints(GOOD, config()) == ["weight_shape is missing"]
    only_scale = {"up__weight_scale": ("BF16", 8, 2)}
    assert "scales but no codes" in complaints(only_scale, config())[0]
    assert "weight_zero_point is missing" in complaints({**GOOD, **SIZE}, config(symmetric=False))


def test_same_complaint_in_many_modules_is_one_problem():
    tensors = {name.replace("up", part): value for name, value in GOOD.items() for part in "abc"}
    (problem,) = check(headers(**tensors), config()).problems
    assert problem.modules == ["a", "b", "c"]
    assert problem.describe()["count"] == 3


def test_group_size_that_does_not_divide():
    tensors = {"up__weight_packed": ("I32", 8, 12), "up__weight_scale": ("BF16", 8, 2)}
    problems = check(headers(**tensors, **SIZE), config()).problems
    assert problems[0].what == "96 input features are not a multiple of group size 64"
    assert problems[0].cure == "quantize with group size 32, or with one scale per channel"


def test_three_bits_packed_ten_to_a_word(tmp_path):
    packed = {"up__weight_packed": ("I32", 8, 13), "up__weight_scale": ("BF16", 8, 2)}
    (tmp_path / "values").write_bytes((8).to_bytes(8, "little") + (128).to_bytes(8, "little"))
    tensors = headers(**packed)
    size = Tensor("up.weight_shape", "I64", (2,), tmp_path / "values", 0, 16)
    (problem,) = check({**tensors, size.name: size}, config(num_bits=3)).problems
    assert "10 codes of 3 bits per word, where vLLM reads 12 words" in problem.what


def test_quantized_though_ignored():
    tensors = {name.replace("up", "lm_head"): value for name, value in GOOD.items()}
    (problem,) = check(headers(**tensors), config()).problems
    assert "quantization_config does not cover it" in problem.what
    assert problem.severity == "error"


def test_codes_without_a_quantization_config():
    (problem,) = check(headers(**GOOD), {}).problems
    assert problem.severity == "error" and problem.modules == ["up"]
    assert problem.what == "stored quantized, and config.json has no quantization_config"


def test_unknown_formats_are_said_to_be_unchecked():
    tensors = {"up__weight": ("F8_E4M3", 8, 8), "up__weight_scale_inv": ("F32", 1, 1)}
    contents = check(headers(**tensors), {"quant_method": "fp8"})
    (problem,) = contents.problems
    assert problem.severity == "warning"
    assert "format fp8 are not known here and not checked" in problem.what
    assert contents.quantized == {"up"}


def test_gptq():
    good = {
        "up__qweight": ("I32", 16, 8),
        "up__qzeros": ("I32", 2, 1),
        "up__scales": ("F16", 2, 8),
        "up__g_idx": ("I32", 128),
    }
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    contents = check(headers(**good), gptq)
    assert contents.problems == []
    assert contents.sizes == {"up": (8, 128)}
    assert "scales is [2, 9]" in complaints({**good, "up__scales": ("F16", 2, 9)}, gptq)[0]


def test_planned_sizes():
    contents = check_sizes({"up": (8, 96), "lm_head": (8, 96)}, config())
    assert contents.quantized == {"up"}
    assert [p.what for p in contents.problems] == [
        "96 input features are not a multiple of group size 64"
    ]


def test_ranks_that_fit_divide_the_mlp_as_well():
    what, cure = heads_misfit({"num_attention_heads": 9, "intermediate_size": 1536}, 2)
    assert what.startswith("9 attention heads cannot") and cure.endswith("size of 1, 3")
