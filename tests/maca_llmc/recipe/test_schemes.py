"""What a recipe's schemes do with a model's shapes."""

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny import tiny_config

from maca_llmc import MaCaModifier
from maca_llmc.common.errors import UserError
from maca_llmc.model import loading
from maca_llmc.recipe.schemes import check_schemes, describe_scheme, dividing_group_sizes
from maca_llmc.recipe.targets import linear_widths


def shapes(family, **changes):
    return loading.meta_model(tiny_config(family, **changes))


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


def test_bypassing_the_check_would_only_fail_later():
    """llm-compressor's observers cannot split such a width, whatever a runtime could."""
    with pytest.raises(UserError, match="group size 128 does not divide"):
        check_schemes(modifier(128, bypass_divisibility_checks=True), shapes("llama"))


def test_a_group_is_checked_against_its_own_targets_only():
    check_schemes(modifier(64, targets=["re:.*self_attn.*"]), shapes("llama"))


def test_a_group_is_checked_against_what_others_leave_it():
    by_group = {"num_bits": 4, "strategy": "group", "group_size": 64}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": by_group},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"strategy": "channel"}},
    }
    check_schemes(MaCaModifier(config_groups=groups, ignore=["lm_head"]), shapes("llama"))


def test_the_head_may_be_quantized_where_it_is_not_the_embedding():
    quantizing = modifier(32, ["Linear", "re:.*lm_head$"])
    quantizing.ignore = []
    check_schemes(quantizing, shapes("llama"))
    unnamed = modifier(32)
    unnamed.ignore = []
    with pytest.raises(UserError, match=r"lm_head by its class, and vLLM.* or 're:.*lm_head\$'"):
        check_schemes(unnamed, shapes("llama"))
    assert "lm_head" in linear_widths(shapes("llama"), ["Linear"], [])
    with pytest.raises(UserError, match=r"lm_head, which is the input emb.*: add lm_head"):
        check_schemes(quantizing, shapes("llama", tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "MaCaModifier quantizes nothing: give it a scheme for weights$"),
        (
            {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
            "nothing but the KV cache: give it a scheme for weights, or its kv_cache_scheme to the",
        ),
    ],
)
def test_a_modifier_without_a_scheme_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        check_schemes(MaCaModifier(ignore=["lm_head"], **fields), shapes("llama"))


def test_gptaq_refuses_the_head():
    quantizing = modifier(32, gptaq_alpha=0.25)
    check_schemes(quantizing, shapes("llama"))
    quantizing.ignore = []
    with pytest.raises(UserError, match=r"within decoder layers, and .* lm_head: add it"):
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


FLOAT = {"num_bits": 8, "type": "float"}
REFUSED = {
    "embeddings": (
        {"targets": ["Linear", "Embedding"]},
        r"quantizes model\.embed_tokens, an embedding, which is not done here: take it out of the "
        r"targets, or add model\.embed_tokens to",
    ),
    "everything": ({"targets": ["re:.*"]}, r"quantizes model\.embed_tokens, an embedding"),
    "MXFP4 without its scale_dtype": (
        {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}},
        r"group_0 would be written with other values .* scale_dtype",
    ),
    "static outputs": (
        {"output_activations": {"num_bits": 8, "strategy": "tensor"}},
        "group_0 has output_activations, whose scales are not calibrated here: leave them out",
    ),
    "dynamic outputs": (
        {"output_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": True}},
        "group_0 has output_activations",
    ),
    "dynamic weights": (
        {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": True}},
        "group_0 has weights with dynamic: true, which leaves nothing to compute: leave it out",
    ),
    "integers by tensor": (
        {"weights": {"num_bits": 4, "strategy": "tensor"}},
        "group_0 has integers by tensor: vLLM reads integer weights by group or channel, use st",
    ),
    "integers by block": (
        {"weights": {"num_bits": 8, "strategy": "block", "block_structure": [16, 16]}},
        "group_0 has integers by block: ",
    ),
    "blocks wider than inputs": (
        {"weights": FLOAT | {"strategy": "block", "block_structure": [16, 64]}},
        r"blocks of 16 x 64 do not divide model\.layers\.0\.mlp\.down_proj \(64 x 96\): vLLM",
    ),
    "blocks over two parts": (
        {"weights": FLOAT | {"strategy": "block", "block_structure": [64, 32]}},
        r"blocks of 64 x 32 do not divide model\.layers\.0\.self_attn\.k_proj \(32 x 64\)",
    ),
    "inputs alone": (
        {"weights": None, "input_activations": FLOAT | {"strategy": "tensor"}},
        "MaCaModifier quantizes nothing: give it a scheme for weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_schemes_that_would_be_wrong_or_are_read_by_nothing_are_refused(case):
    changes, says = REFUSED[case]
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    quantizing = MaCaModifier(config_groups={"group_0": group | changes}, ignore=["lm_head"])
    with pytest.raises(UserError, match=says):
        check_schemes(quantizing, shapes("llama"))


def test_a_group_without_weights_beside_others_is_refused():
    inputs = FLOAT | {"strategy": "tensor"}
    groups = {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "strategy": "channel"}},
        "group_1": {"targets": ["re:.*self_attn$"], "input_activations": inputs},
    }
    with pytest.raises(UserError, match="group_1 has no weights, and vLLM reads no group without"):
        check_schemes(MaCaModifier(config_groups=groups), shapes("llama"))


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_kv_caches_that_vllm_reads_are_taken(strategy):
    cache = FLOAT | {"strategy": strategy, "symmetric": True}
    check_schemes(modifier(32, kv_cache_scheme=cache), shapes("llama"))


def test_blocks_need_not_divide_the_rows_of_last_parts():
    weights = FLOAT | {"strategy": "block", "block_structure": [32, 32]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantizing = MaCaModifier(config_groups=groups, ignore=["lm_head"])
    check_schemes(quantizing, shapes("llama", num_key_value_heads=2))
    model = shapes("llama", hidden_size=96, head_dim=24, num_key_value_heads=1)  # 24 rows
    with pytest.raises(UserError, match=r"divide .*k_proj \(24 x 96\)"):
        check_schemes(quantizing, model)
    groups["group_0"]["targets"] = ["re:.*(v|o|gate|up|down)_proj"]
    check_schemes(MaCaModifier(config_groups=groups), model)
