"""Every recipe file on a tiny model of its family, and what is refused of a broken one."""

from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import quantization_config, quantize, quantized_modules, tensors
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from llmcompressor.modifiers.gptq import GPTQModifier
from tiny import WIDE

from maca_llmc import MaCaModifier
from maca_llmc.common.errors import UserError
from maca_llmc.recipe.reading import quantizing_modifiers, read_recipe, save_recipe, scheme_recipe

FILES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
FAMILIES = {"qwen3": ["qwen3", "qwen3_moe"], "gemma3": ["gemma3_text", "gemma3"]}
"""By the first part of a recipe's name; llama for all others."""

SHAPE = {**WIDE, "num_hidden_layers": 1}
EXPECTED = {
    "w4a16-g128": (4, "group", 128),
    "w4a16-g64": (4, "group", 64),
    "w4a16-channel": (4, "channel", None),
    "w3a16-g64": (3, "group", 64),
    "w2a16-g64": (2, "group", 64),
    "w8a8": (8, "channel", None),
    "qwen3-w4a16": (4, "group", 128),
    "gemma3-w4a16": (4, "group", 128),
    "llama3-w4a16": (4, "group", 128),
}
VALID = """
quantize_stage:
  quantize_modifiers:
    GPTQModifier:
      scheme: W4A16
      ignore: [lm_head]
"""


def families(file):
    return FAMILIES.get(file.name.split("-")[0], ["llama"])


def test_the_recipes_are_the_ones_expected():
    assert {file.name.split(".")[0] for file in FILES} == EXPECTED.keys()
    assert len(FILES) == 15


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_names_its_method(file):
    modifier = quantizing_modifiers(read_recipe(file))[0]
    method = {"maca": MaCaModifier, "gptq": GPTQModifier}[file.suffixes[-2].removeprefix(".")]
    assert type(modifier) is method
    assert method is GPTQModifier or modifier.length_exponent == 1.0


@pytest.mark.parametrize(
    ("file", "family"),
    [pytest.param(f, family, id=f"{f.stem}-{family}") for f in FILES for family in families(f)],
)
def test_recipe_quantizes_a_model_of_its_family(tiny_models, tmp_path, file, family):
    tied = family != "qwen3"
    source = tiny_models(family, **SHAPE, tie_word_embeddings=tied)
    output = quantize(source, tmp_path / "out", file)

    bits, strategy, group_size = EXPECTED[file.name.split(".")[0]]
    config = quantization_config(output)
    assert len(config["config_groups"]) == 1
    group = config["config_groups"]["group_0"]
    weights = group["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (
        bits,
        strategy,
        group_size,
    )
    assert (group["input_activations"] is not None) == (bits == 8)
    assert group["format"] == ("int-quantized" if bits == 8 else "pack-quantized")

    before, after = tensors(source), tensors(output)
    suffix = ".weight_scale"
    quantized = {name.removesuffix(suffix) for name in after if name.endswith(suffix)}
    linears = {
        name.removesuffix(".weight")
        for name in before
        if name.endswith("_proj.weight") and "vision_tower" not in name
    }
    assert quantized == linears and len(linears) >= 7
    untouched = before.keys() - {f"{name}.weight" for name in linears}
    assert untouched == {n for n in after if n.rpartition(".")[0] not in linears}
    for name in untouched:
        assert torch.equal(before[name], after[name]), name
    assert any("lm_head" in name for name in after) == (not tied), "one tensor when tied"
    assert any("embed_tokens" in name for name in after)


def test_the_vision_tower_and_projector_are_left_alone_on_reload_too(tiny_models, tmp_path):
    source = tiny_models("gemma3", **SHAPE)
    recipe = next(file for file in FILES if file.name.startswith("gemma3"))
    modules = quantized_modules(quantize(source, tmp_path / "out", recipe))
    assert len(modules) == 7 and all("language_model.layers" in name for name in modules)


def test_one_word_makes_a_gptq_recipe_a_maca_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(VALID)
    stock = quantizing_modifiers(read_recipe(file))[0]
    file.write_text(VALID.replace("GPTQModifier", "MaCaModifier"))
    maca = quantizing_modifiers(read_recipe(file))[0]
    assert type(stock) is GPTQModifier and type(maca) is MaCaModifier
    own = {"length_exponent", "nested_scales", "first_token_weight"}
    own |= {"hessian_scales", "signed_scales", "gptaq_alpha"}
    assert stock.model_dump() == maca.model_dump(exclude=own)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16_ASYM"])
def test_preset_schemes_run_with_maca_and_nested_scales(tiny_models, tmp_path, scheme):
    text = VALID.replace("GPTQModifier", "MaCaModifier").replace("W4A16", scheme)
    file = tmp_path / "recipe.yaml"
    file.write_text(text + "      nested_scales: [8, 16]\n")
    assert quantizing_modifiers(read_recipe(file))[0].nested_scales == [8, 16]
    output = quantize(tiny_models("llama", **SHAPE), tmp_path / "out", file)
    weights = quantization_config(output)["config_groups"]["group_0"]["weights"]
    assert (weights["type"], weights["symmetric"]) == {
        "FP8_DYNAMIC": ("float", True),
        "W4A16_ASYM": ("int", False),
    }[scheme]
    assert len(quantized_modules(output)) == 7
    saved = yaml.safe_load((output / "recipe.yaml").read_text())
    assert saved["quantize_stage"]["quantize_modifiers"]["MaCaModifier"]["nested_scales"] == [8, 16]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_saved_recipe_reads_as_the_same(tmp_path, file):
    recipe = read_recipe(file)
    save_recipe(recipe, tmp_path)
    again = read_recipe(tmp_path / "recipe.yaml")
    assert [type(modifier) for modifier in again.modifiers] == [
        type(modifier) for modifier in recipe.modifiers
    ]
    for one, other in zip(recipe.modifiers, again.modifiers, strict=True):
        away = {"config_groups", "scheme"}  # saved resolved, and compared so
        assert one.model_dump(exclude=away) == other.model_dump(exclude=away)
        assert one.resolve_quantization_config() == other.resolve_quantization_config()


@pytest.mark.parametrize("actorder", ["null", "static", "weight"])
def test_a_saved_recipe_keeps_its_ordering_none_included(tmp_path, actorder):
    file = tmp_path / "given.yaml"
    file.write_text(VALID + f"      actorder: {actorder}\n")
    recipe = read_recipe(file)
    save_recipe(recipe, tmp_path)
    again = read_recipe(tmp_path / "recipe.yaml").modifiers[0]
    assert again.actorder == recipe.modifiers[0].actorder
    assert (again.actorder is None) == (actorder == "null")


def test_a_recipe_saved_after_a_rotation_can_be_run_again(tiny_models, tmp_path):
    source = tiny_models("llama", **SHAPE)
    file = tmp_path / "given.yaml"
    spin = "    SpinQuantModifier: {rotations: [R1, R2], transform_type: hadamard}\n"
    file.write_text(VALID.replace("    GPTQModifier", spin + "    GPTQModifier"))
    first = quantize(source, tmp_path / "first", file)
    again = quantize(source, tmp_path / "again", first / "recipe.yaml")
    one, other = tensors(first), tensors(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ({"hidden_size": 128, "intermediate_size": 256}, ("group", 128)),
        ({"hidden_size": 64, "intermediate_size": 192}, ("group", 64)),
        ({"hidden_size": 64, "intermediate_size": 96}, ("group", 32)),
        ({"hidden_size": 64, "intermediate_size": 72}, ("channel", None)),
    ],
)
def test_the_scheme_recipe_takes_the_largest_group_that_fits(tiny_model, widths, expected):
    head = widths["hidden_size"] // 4
    model = tiny_model("llama", num_hidden_layers=1, head_dim=head, **widths)
    modifier = quantizing_modifiers(scheme_recipe(model))[0]
    weights = modifier.resolved_config.config_groups["group_0"].weights
    assert type(modifier) is MaCaModifier and modifier.ignore == ["lm_head"]
    assert (weights.num_bits, weights.strategy, weights.group_size) == (4, *expected)


BROKEN = {
    "not YAML": ("a: [1", r"is not valid YAML: .*line 1"),
    "nothing": ("", r"parses to nothing.*NAME_stage"),
    "a comment": ("# nothing\n", r"parses to nothing"),
    "a text": ("just words", r"parses to nothing"),
    "wrong stage key": (VALID.replace("quantize_stage", "quantize"), r"'quantize' does not end in"),
    "empty stage": ("quantize_stage:\n", r"quantize_stage holds no modifiers"),
    "wrong group key": (
        VALID.replace("quantize_modifiers", "modifiers_"),
        r"'modifiers_' does not end in _modifiers",
    ),
    "empty group": (
        "quantize_stage:\n  quantize_modifiers:\n",
        r"quantize_modifiers holds no modifiers",
    ),
    "only arguments": ("args: {bits: 4}\n", r"parses to no modifier"),
    "unknown modifier": (VALID.replace("GPTQ", "GPTC"), r"'GPTCModifier'.*Use MaCaModifier"),
    "unknown field": (
        VALID + "      lenght_exponent: 1\n",
        r"unknown field 'lenght_exponent' of GPTQModifier: is it 'length_exponent'",
    ),
    "field of the other modifier": (VALID + "      length_exponent: 1\n", r"'length_exponent'"),
    "a field of those that quantize": (
        "a_stage: {b_modifiers: {AWQModifier: {config_groups: {}}}}",
        r"unknown field 'config_groups' of AWQModifier: it is a field of MaCaModifier: give it th",
    ),
    "unknown field of a scheme": (
        VALID.replace(
            "scheme: W4A16",
            "config_groups: {g: {targets: [Linear], weights: {num_bit: 4}}}",
        ),
        r"unknown field 'config_groups\.g\.weights\.num_bit' .*: is it 'num_bits'",
    ),
    "floats that there are not": (
        VALID.replace(
            "scheme: W4A16",
            "config_groups: {g: {targets: [Linear], weights: {num_bits: 6, type: float}}}",
        ),
        r"Only num_bits in \(8\)",
    ),
    "wrong value": (
        VALID + "      block_size: many\n",
        r"GPTQModifier: block_size 'many': .*integer",
    ),
    "no fields": (
        "quantize_stage:\n  quantize_modifiers:\n    MaCaModifier:\n",
        r"MaCaModifier has no fields: give it a scheme",
    ),
    "unknown scheme": (
        VALID.replace("W4A16", "W5A17"),
        r"scheme 'W5A17': .*preset scheme names \(.*, W4A16, .*\)",
    ),
    "a broken expression": (
        VALID.replace("lm_head", "'re:*head'"),
        r"'re:\*head' is no regular expression: nothing to repeat",
    ),
    "unknown observer": (
        VALID + "      weight_observer: mean\n",
        r"no observer 'mean': use one of .*memoryless_mse, .*minmax",
    ),
    "orders that disagree": (
        VALID.replace(
            "scheme: W4A16",
            "actorder: weight\n      config_groups: {group_0: {targets: [Linear], weights: "
            "{num_bits: 4, strategy: group, group_size: 32, actorder: static}}}",
        ),
        r"activation ordering",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_refused_in_one_line(tmp_path, case):
    text, message = BROKEN[case]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml is no file: see recipes/"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_a_recipe_that_quantizes_nothing_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "a_stage:\n  b_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.5}\n"
    )
    with pytest.raises(UserError, match="quantizes nothing: add a MaCaModifier"):
        quantizing_modifiers(read_recipe(file))


def test_modifiers_with_hessians_stand_first(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "a_stage: {b_modifiers: {QuantizationModifier: {scheme: FP8_DYNAMIC, targets: ['re:.*v']}, "
        "MaCaModifier: {scheme: W4A16, targets: ['re:.*k']}}}"
    )
    names = [type(modifier).__name__ for modifier in quantizing_modifiers(read_recipe(file))]
    assert names == ["MaCaModifier", "QuantizationModifier"]


MACA = "MaCaModifier: {scheme: W4A16, ignore: [lm_head]}"


@pytest.mark.parametrize(
    ("modifiers", "says"),
    [
        ([MACA, MACA], "key 'MaCaModifier' stands twice"),
        ([MACA, "SmoothQuantModifier: {}"], "SmoothQuantModifier would change what is quantized"),
        ([MACA, "SpinQuantModifier: {rotations: [R1]}"], "SpinQuantModifier would change"),
        (["MaCaModifier: {scheme: W4A16, actorder: group}"], "actorder=None instead.$"),
        (["MaCaModifier: {scheme: W4A16, dampening_frac: -0.5}"], "dampening_frac -0.5"),
        (["MaCaModifier: {scheme: W4A16, block_size: 0}"], "block_size 0"),
    ],
)
def test_recipes_that_would_do_something_else_are_refused(tmp_path, modifiers, says):
    file = tmp_path / "recipe.yaml"
    file.write_text("a_stage:\n  b_modifiers:\n" + "".join(f"    {m}\n" for m in modifiers))
    with pytest.raises(UserError, match=says):
        read_recipe(file)


def test_one_modifier_in_two_stages_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"a_stage: {{b_modifiers: {{{MACA}}}}}\nc_stage: {{b_modifiers: {{{MACA}}}}}\n")
    with pytest.raises(UserError, match="has MaCaModifier 2 times: give one all config_groups"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w3a16", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}),
        ("W8A8", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("NVFP4A16", {"num_bits": 4, "type": "float", "strategy": "tensor_group"}),
        ("fp8-dynamic", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ],
)
def test_a_scheme_by_name_is_compressed_tensors_own(tiny_model, scheme, expected):
    model = tiny_model("llama", hidden_size=96, intermediate_size=160)
    modifier = quantizing_modifiers(scheme_recipe(model, scheme))[0]
    (group,) = modifier.resolved_config.config_groups.values()
    found = group.weights.model_dump()
    assert {key: found[key] for key in expected} == expected
    assert group.targets == ["Linear"] and isinstance(modifier, MaCaModifier)


def preset_of(file):
    return file.name.split(".")[0].upper().replace("-", "_")


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if preset_of(file) in PRESET_SCHEMES and ".maca." in file.name],
    ids=lambda file: file.name,
)
def test_a_scheme_by_name_is_the_shipped_recipe_of_that_name(tiny_model, file):
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    (named,) = quantizing_modifiers(scheme_recipe(model, preset_of(file)))
    (shipped,) = quantizing_modifiers(read_recipe(file))
    (of_named,) = named.resolved_config.config_groups.values()
    (of_shipped,) = shipped.resolved_config.config_groups.values()
    assert of_named == of_shipped
    fields = {"length_exponent", "first_token_weight", "hessian_scales", "nested_scales"}
    assert named.model_dump(include=fields) == shipped.model_dump(include=fields)
