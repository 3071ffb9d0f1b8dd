"""What a recipe's schemes do with a model's shapes."""

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny import tiny_config

from maca_llmc import MaCaModifier, models
from maca_llmc.errors import UserError
from maca_llmc.schemes import (
    check_overlap,
    check_schemes,
    default_ignore,
    describe_scheme,
    dividing_group_sizes,
    linear_widths,
)


def shapes(family, **changes):
    return models.meta_model(tiny_config(family, **changes))


def modifier(size=None, targets=("Linear",), **fields):
    weights = {"num_bits": 4, "strategy": "group" if size else "channel", "group_size": size}
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    return MaCaModifier(config_groups=groups, ignore=["lm_head"], **fields)


def test_a_group_size_that_divides_no_layer_is_refused_with_those_that_would():
    match = (
        r"group size 128 does not divide the input width of 14 of 14 Linears, first "
        r"model.layers.0.self_attn.q_proj \(64\): 32, 16 would, and strategy: channel"
    )
    with pytest.raises(UserError, match=match):
        check_schemes(modifier(128), shapes("llama"))


def test_a_group_size_that_divides_only_some_is_refused():
    with pytest.raises(UserError, match=r"of 2 of 14 Linears, first .*down_proj \(96\): 32, 16 "):
        check_schemes(modifier(64), shapes("llama"))


def test_where_none_of_the_usual_sizes_does_the_message_says_so():
    with pytest.raises(UserError, match=r"\(100\): none of the usual ones does, and strategy"):
        check_schemes(modifier(64), shapes("llama", intermediate_size=100))


@pytest.mark.parametrize("size", [32, 16, None])
def test_sizes_that_divide_and_channels_are_taken(size):
    check_schemes(modifier(size), shapes("llama"))


def test_a_recipe_may_bypass_the_check_as_in_llm_compressor():
    check_schemes(modifier(128, bypass_divisibility_checks=True), shapes("llama"))


def test_a_group_is_checked_against_its_own_targets_only():
    check_schemes(modifier(64, targets=["re:.*self_attn.*"]), shapes("llama"))


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UserError, match=r"\['re:.*nothing'\] match no Linear .*\[Linear\]"):
        check_schemes(modifier(32, targets=["re:.*nothing"]), shapes("llama"))


def test_the_head_may_be_quantized_where_it_is_not_the_embedding():
    quantizing = modifier(32)
    quantizing.ignore = []
    check_schemes(quantizing, shapes("llama"))
    assert "lm_head" in linear_widths(shapes("llama"), ["Linear"], [])
    with pytest.raises(UserError, match=r"lm_head, which is the input emb.*: add lm_head"):
        check_schemes(quantizing, shapes("llama", tie_word_embeddings=True))


def test_an_ignored_name_that_is_no_module_is_refused():
    quantizing = modifier(32)
    quantizing.ignore = ["lm_head", "re:.*router.*"]  # an expression may match nothing
    check_schemes(quantizing, shapes("llama"))
    quantizing.ignore = ["lm_haed"]
    with pytest.raises(UserError, match="ignores 'lm_haed', which is no module of the model"):
        check_schemes(quantizing, shapes("llama"))


@pytest.mark.parametrize(("bits", "taken"), [(1, False), (2, True), (8, True), (17, False)])
def test_bits_that_vllm_reads(bits, taken):
    weights = {"num_bits": bits, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantizing = MaCaModifier(config_groups=groups, ignore=["lm_head"])
    if taken:
        check_schemes(quantizing, shapes("llama"))
    else:
        with pytest.raises(UserError, match=rf"group_0 has weights of {bits} bits: .* 2 to 8"):
            check_schemes(quantizing, shapes("llama"))


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ([128, 256], [128, 64, 32, 16]),
        ([576, 1536], [64, 32, 192, 96, 48, 16]),  # SmolLM2
        ([4096, 14336], [128, 64, 32, 256, 16]),  # Llama 3
        ([100], []),
    ],
)
def test_dividing_group_sizes(widths, expected):
    assert dividing_group_sizes(iter(widths)) == expected


def test_widths_are_of_what_is_left_to_quantize():
    widths = linear_widths(shapes("qwen3_moe", num_hidden_layers=1), ["Linear"], ["lm_head"])
    experts = {name: width for name, width in widths.items() if "experts" in name}
    assert len(widths) == 4 + 12 and len(experts) == 12
    assert {width for name, width in experts.items() if name.endswith("down_proj")} == {32}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["lm_head"]),
        ("qwen3_moe", ["lm_head", r"re:.*mlp\.gate$"]),
    ],
)
def test_what_is_left_alone_by_default(family, expected):
    assert default_ignore(shapes(family)) == expected


def test_vision_towers_and_projectors_are_left_alone_by_default(tiny_models):
    model = models.meta_model(models.load_config(str(tiny_models("gemma3"))))
    ignore = default_ignore(model)
    assert len(linear_widths(model, ["Linear"], ignore)) == 14
    assert len(linear_widths(model, ["Linear"], ["lm_head"])) > 14


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}},
            "W4A16 int, group 128, symmetric",
        ),
        (
            {
                "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False},
                "input_activations": {"num_bits": 8},
            },
            "W8A8 int, channel, asymmetric",
        ),
        (
            {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
            "W8A16 float, tensor, symmetric",
        ),
        ({"input_activations": {"num_bits": 8}}, "A8 only"),
    ],
)
def test_schemes_in_words(fields, expected):
    arguments = {name: QuantizationArgs(**value) for name, value in fields.items()}
    assert describe_scheme(QuantizationScheme(targets=["Linear"], **arguments)) == expected


def test_a_linear_of_two_modifiers_is_refused():
    model = shapes("llama")
    attention, mlp = modifier(32, ["re:.*attn.*"]), modifier(32, ["re:.*mlp.*"])
    check_overlap([attention, mlp], model)
    with pytest.raises(UserError, match=r"mlp.gate_proj is quantized by MaCaModifier and by"):
        check_overlap([mlp, modifier(32)], model)
