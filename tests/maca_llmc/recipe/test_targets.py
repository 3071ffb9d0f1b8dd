"""What targets and ignored entries name, and what is refused of them."""

import pytest
from loguru import logger
from tiny import tiny_config

from maca_llmc import MaCaModifier
from maca_llmc.common.errors import UserError
from maca_llmc.model import loading
from maca_llmc.recipe.targets import (
    check_overlap,
    check_targets,
    default_ignore,
    linear_schemes,
    linear_widths,
    unlike_siblings,
)

CHANNEL = {"num_bits": 4, "strategy": "channel"}
EIGHT = {"num_bits": 8, "strategy": "channel"}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def shapes(family, **changes):
    return loading.meta_model(tiny_config(family, **changes))


def modifier(*targets, ignore=("lm_head",)):
    """One group for each list of targets."""
    groups = {
        f"group_{number}": {"targets": list(group), "weights": EIGHT if number else CHANNEL}
        for number, group in enumerate(targets or [["Linear"]])
    }
    return MaCaModifier(config_groups=groups, ignore=list(ignore))


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UserError, match=r"\['re:.*nothing'\] match no Linear .*\[Linear\]"):
        check_targets(modifier(["re:.*nothing"]), shapes("llama"))


def test_a_name_among_targets_that_is_no_module_is_refused():
    with pytest.raises(UserError, match=r"group_0 targets 'Linaer', which is no module or class"):
        check_targets(modifier(["re:.*q_proj", "Linaer"]), shapes("llama"))


def test_an_expression_among_targets_may_match_nothing():
    widths = check_targets(modifier(["re:.*q_proj", "re:.*router"]), shapes("llama"))
    assert widths == {f"model.layers.{n}.self_attn.q_proj": 64 for n in range(2)}


def test_all_others_may_be_targeted_by_class_before_or_after_expressions():
    for groups in ([["Linear"], ["re:.*down_proj"]], [["re:.*down_proj"], ["Linear"]]):
        quantizing, model = modifier(*groups), shapes("llama")
        assert len(check_targets(quantizing, model)) == 14
        expected = {name: name.endswith("down_proj") for name in check_targets(quantizing, model)}
        down = groups.index(["re:.*down_proj"])
        by_group = list(quantizing.resolved_config.config_groups.values())
        schemes = linear_schemes([quantizing], model)
        assert {name: scheme is by_group[down] for name, scheme in schemes.items()} == expected


def test_schemes_are_those_that_compressed_tensors_applies():
    names = ["model.layers.0.mlp.down_proj"]
    quantizing, model = modifier(["Linear"], ["re:.*mlp.up.*"], names), shapes("llama")
    expected = linear_schemes([quantizing], model)
    assert len(set(map(id, expected.values()))) == 3
    quantizing.initialize_quantization(model)
    applied = {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    assert applied == expected


def test_exceptions_are_said_by_name_or_expression_beside_a_class():
    names = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    for groups in ([["Linear"], names], [["re:.*mlp.*"], names], [["Linear"], names[:1]]):
        quantizing, model = modifier(*groups), shapes("llama")
        check_targets(quantizing, model)
        exception = quantizing.resolved_config.config_groups["group_1"]
        schemes = linear_schemes([quantizing], model)
        assert [name for name in schemes if schemes[name] is exception] == groups[1]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            [["re:.*mlp.*"], ["re:.*down_proj"]],
            r"layers.0.mlp.down_proj is in group_1 by 're:.*down_proj' and in group_0 by "
            r"'re:.*mlp.*': narrow one",
        ),
        ([["Linear"], ["Linear"]], r"group_0 and group_1 both target 'Linear': leave it to one"),
        ([["Linear"], ["re:lm_head"]], r"group_1 has nothing to quantize: what its targets"),
        ([["Linear"], ["re:.*router"]], r"group_1 has nothing to quantize"),
        ([["re:.*_proj"], ["Linear"]], r"group_1 has nothing to quantize"),
    ],
)
def test_groups_that_would_not_get_what_they_target_are_refused(targets, says):
    with pytest.raises(UserError, match=says):
        check_targets(modifier(*targets), shapes("llama"))


def test_an_ignored_name_that_is_no_module_is_refused():
    # an expression may match nothing
    check_targets(modifier(ignore=["lm_head", "re:.*router.*"]), shapes("llama"))
    with pytest.raises(UserError, match="ignores 'lm_haed', which is no module of the model"):
        check_targets(modifier(ignore=["lm_haed"]), shapes("llama"))


@pytest.mark.parametrize(
    ("entry", "cure"),
    [
        ("model.layers.0", r"re:model\.layers\.0\."),
        ("LlamaAttention", r"re:.*\.self_attn\."),
    ],
)
def test_an_ignored_module_around_linears_is_refused_with_what_leaves_them_out(entry, cure):
    model = shapes("llama")
    with pytest.raises(UserError) as caught:
        check_targets(modifier(ignore=["lm_head", entry]), model)
    assert str(caught.value).startswith(f"the recipe ignores {entry!r}, which is not quantized")
    assert str(caught.value).endswith(f"ignore '{cure}' instead")
    left = check_targets(modifier(ignore=["lm_head", cure]), model)
    assert len(left) == (7 if entry == "model.layers.0" else 6)


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
        ("qwen2_moe", ["lm_head", r"re:.*mlp\.gate$", r"re:.*\.shared_expert_gate$"]),
        ("hunyuan_v1_moe", ["lm_head", r"re:.*mlp\.gate$", r"re:.*mlp\.gate\.wg$"]),
        ("phimoe", ["lm_head", "re:.*router.*"]),
        ("gemma4_text", ["lm_head", r"re:(.*\.)?per_layer_model_projection$"]),
        (
            "gemma3n_text",
            [
                "lm_head",
                "re:.*router.*",
                r"re:(.*\.)?correction_coefs$",
                r"re:(.*\.)?prediction_coefs$",
                r"re:(.*\.)?linear_left$",
                r"re:(.*\.)?linear_right$",
                r"re:(.*\.)?per_layer_model_projection$",
                r"re:(.*\.)?altup_projections\.\d+$",
                r"re:(.*\.)?altup_unembed_projections\.\d+$",
            ],
        ),
        ("jamba", ["lm_head", "re:.*router.*", r"re:.*\.mamba\.(in|x|dt|out)_proj$"]),
    ],
)
def test_what_is_left_alone_by_default(family, expected):
    layers = 4 if family == "gemma3n_text" else 2  # two of them share keys and values
    assert default_ignore(shapes(family, num_hidden_layers=layers)) == expected


@pytest.mark.parametrize(
    ("family", "ignore", "error"),
    [
        (
            "gpt2",
            ["lm_head"],
            r"no Linear \(Conv1D in their place\), and only Linears are quantized",
        ),
        ("llama", ["re:.*"], "the recipe's ignore list leaves nothing of its targets to quantize"),
        ("phimoe", ["lm_head"], r"mlp.router is a PhimoeTopKRouter, a Linear .* to the recipe's"),
    ],
)
def test_why_nothing_or_too_much_is_quantized(family, ignore, error):
    with pytest.raises(UserError, match=error):
        check_targets(modifier(ignore=ignore), shapes(family))


def test_vision_towers_and_projectors_are_left_alone_by_default(tiny_models):
    model = loading.meta_model(loading.load_config(str(tiny_models("gemma3"))))
    ignore = default_ignore(model)
    assert len(linear_widths(model, ["Linear"], ignore)) == 14
    assert len(linear_widths(model, ["Linear"], ["lm_head"])) > 14


def test_a_linear_of_two_modifiers_is_refused():
    model = shapes("llama")
    attention, mlp = modifier(["re:.*attn.*"]), modifier(["re:.*mlp.*"])
    check_overlap([attention, mlp], model)
    with pytest.raises(UserError, match=r"mlp.gate_proj is quantized by MaCaModifier and by"):
        check_overlap([mlp, modifier()], model)


def test_a_quantized_cache_needs_its_attention():
    model = shapes("llama")
    fields = {"scheme": "W8A16", "kv_cache_scheme": CACHE}
    keeping = ["lm_head", r"re:.*self_attn\..*"]
    check_targets(MaCaModifier(**fields, ignore=keeping), model)
    with pytest.raises(UserError, match=r"ignores model.layers.0.self_attn, whose .* would") as no:
        check_targets(MaCaModifier(**fields, ignore=["re:.*self_attn.*"]), model)
    assert str(no.value).endswith(f"ignore '{keeping[1]}'")


@pytest.mark.parametrize(
    ("targets", "ignore", "unlike"),
    [
        ([["Linear"]], [], None),
        ([["re:.*self_attn"], ["re:.*mlp"]], [], None),
        (
            [["re:.*[qkv]_proj"], ["re:.*1.*(o|up|down)_proj", "re:.*gate_proj"]],
            ["re:.*0.*gate_proj"],
            None,
        ),
        (
            [["Linear"], ["re:.*1.*k_proj"]],
            [],
            "q_proj, k_proj, v_proj of model.layers.1.self_attn",
        ),
        ([["Linear"]], ["re:.*up_proj"], "gate_proj, up_proj of model.layers.0.mlp"),
        ([["Linear"]], ["re:.*layers.1.*"], None),
    ],
)
def test_linears_that_vllm_fuses_and_that_differ_are_named(targets, ignore, unlike):
    quantizing = modifier(*targets, ignore=["lm_head", *ignore])
    assert unlike_siblings([quantizing], shapes("llama")) == unlike


@pytest.mark.parametrize(
    ("ignore", "unlike"),
    [
        ([], None),
        (["re:.*experts.*"], None),
        (["re:.*experts.*down_proj"], "parts of model.layers.0.mlp.experts"),
        (["re:.*1.mlp.experts.3.*"], "parts of model.layers.1.mlp.experts"),
    ],
)
def test_experts_that_differ_are_named(ignore, unlike):
    quantizing = modifier(ignore=["lm_head", "re:.*gate$", *ignore])
    assert unlike_siblings([quantizing], shapes("qwen3_moe")) == unlike


def test_the_end_of_a_name_is_answered_with_the_expression_for_it():
    model, cure = shapes("llama"), r"which is no module .*: write 're:\.\*q_proj\$'$"
    with pytest.raises(UserError, match="targets 'q_proj', " + cure):
        check_targets(modifier(["q_proj"]), model)
    with pytest.raises(UserError, match="ignores 'q_proj', " + cure):
        check_targets(modifier(ignore=["lm_head", "q_proj"]), model)
    assert len(check_targets(modifier(["re:.*q_proj$"]), model)) == 2


def test_an_expression_that_ignores_nothing_is_said():
    said = []
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        check_targets(modifier(ignore=["lm_head", "re:lmhead"]), shapes("llama"))
    finally:
        logger.remove(handle)
    assert said == ["the recipe ignores 're:lmhead', which matches nothing in the model"]


def test_gate_and_up_by_other_names_are_fused_too():
    """LFM2's are w1 and w3."""
    model = shapes("llama")
    for layer in model.model.layers:
        layer.mlp.w1, layer.mlp.w3 = layer.mlp.gate_proj, layer.mlp.up_proj
        del layer.mlp.gate_proj, layer.mlp.up_proj
    quantizing = modifier(ignore=["lm_head", "re:.*w3"])
    assert unlike_siblings([quantizing], model) == "w1, w3 of model.layers.0.mlp"
