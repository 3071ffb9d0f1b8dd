"""The whole run, from Python: what is in the folder, and when there is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    DATA,
    greedy,
    load,
    quantization_config,
    quantize,
    quantized_modules,
    tensors,
)
from tiny import WIDE, random_sequences, random_text, save_tiny_model
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

import maca_llmc
from maca_llmc.common.errors import UserError
from maca_llmc.common.record import RECORD_FILE
from maca_llmc.evaluation.divergence import load_dequantized
from maca_llmc.llmcompressor_api import loading_separate_experts
from maca_llmc.model import loading
from maca_llmc.run import quantize_run

SHAPE = {"num_hidden_layers": 1}
ROOT = Path(__file__).parents[3]
PROMPTS = random_sequences([5, 9, 14, 30])
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class InMemory:
    """A run's model when it had calibrated: dequantized weights by name, and greedy tokens."""

    def __init__(self):
        self.weights, self.tokens = {}, []

    def keep(self, model):
        self.weights = {
            name: module.weight.detach().clone()
            for name, module in model.named_modules()
            if hasattr(module, "quantization_scheme") and isinstance(module, torch.nn.Linear)
        }
        self.tokens = greedy(model, PROMPTS)


@pytest.fixture
def in_memory(monkeypatch):
    """What the runs of a test hold before they save."""
    kept = InMemory()
    original = quantize_run._calibrate

    def calibrate(*args):
        model = original(*args)
        kept.keep(model)
        return model

    monkeypatch.setattr(quantize_run, "_calibrate", calibrate)
    return kept


@pytest.fixture(scope="module")
def licensed_model(tmp_path_factory):
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("licensed"), **SHAPE)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n# Base\n")
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(licensed_model, tmp_path_factory):
    """One run of a model with a licence and generation settings, with the defaults."""
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in random_text()))
    output = tmp_path_factory.mktemp("run") / "new" / "checkpoint"
    settings = DATA | {"data": file, "text_column": "body", "seed": 3}
    settings["record_diagonals"] = True
    assert maca_llmc.quantize(output, model=str(licensed_model), **settings) == output
    return output


# what is in the folder


def test_the_folder_holds_all_that_a_reader_needs(checkpoint):
    assert {file.name for file in checkpoint.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "maca_diagonals.json",
        "maca_run.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    text = "Hello tokens"
    assert AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    assert GenerationConfig.from_pretrained(checkpoint).temperature == 0.6


def test_the_files_are_readable_as_any_new_file(checkpoint, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert {file.stat().st_mode for file in checkpoint.iterdir()} == {plain.stat().st_mode}


def test_the_card_names_the_base_model_and_its_licence(checkpoint, licensed_model):
    card = (checkpoint / "README.md").read_text()
    assert "\nlicense: llama3.2\n" in card and f"base_model: {licensed_model}\n" in card
    assert (
        "**W4A16 int, group 32, symmetric** by MaCa (p = 1, first token x 4, scales by Hessian)"
        in card
    )
    assert "vllm serve ./checkpoint" in card and "(llama3.2)" in card


def test_every_field_of_the_record_is_filled(checkpoint, licensed_model):
    record = json.loads((checkpoint / "maca_run.json").read_text())
    may_be_none = {"container_bits", "peak_device_bytes"}
    assert {key for key, value in record.items() if value is None} == may_be_none
    assert record["base_model"] == str(licensed_model) and record["license"] == "llama3.2"
    assert record["seed"] == record["calibration"]["seed"] == 3
    assert record["calibration"]["source"].endswith("text.jsonl")
    assert record["calibration"]["lengths"].keys() == {"8", "16", "32"}
    assert record["calibration"]["tokens"] == pytest.approx(DATA["tokens"], abs=28)
    assert record["modifier"] == {
        "type": "MaCaModifier",
        "block_size": 128,
        "dampening_frac": 0.01,
        "length_exponent": 1.0,
        "nested_scales": None,
        "first_token_weight": 4.0,
        "hessian_scales": True,
        "signed_scales": True,
        "gptaq_alpha": 0.0,
    }
    assert record["versions"]["llmcompressor"] == "0.14.0.1"
    assert record["wall_seconds"].keys() == {"load", "calibrate", "save"}
    assert all(seconds > 0 for seconds in record["wall_seconds"].values())
    assert 50e6 < record["peak_rss_bytes"] < 50e9


def test_losses_of_all_quantized_modules_are_recorded(checkpoint):
    modules = json.loads((checkpoint / "maca_run.json").read_text())["modules"]
    assert {module["name"].rpartition(".")[2] for module in modules} == PROJECTIONS
    assert len(modules) == 7
    assert all(1e-5 < module["loss"] < 0.1 for module in modules)


def test_diagonals_are_kept_per_length(checkpoint):
    diagonals = json.loads((checkpoint / "maca_diagonals.json").read_text())
    assert diagonals["lengths"] == [8, 16, 32]
    assert set(diagonals["modules"]) == {
        f"model.layers.0.{name}"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    }
    for name, by_length in diagonals["modules"].items():
        width = 96 if name.endswith("down_proj") else 64
        assert {len(values) for values in by_length.values()} == {width}


def test_gptq_has_no_diagonals(tiny_models, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("a_stage: {b_modifiers: {GPTQModifier: {scheme: W8A8, ignore: [lm_head]}}}")
    source = tiny_models("llama", **SHAPE)
    with pytest.raises(UserError, match="--record-diagonals: no MaCaModifier"):
        quantize(source, tmp_path / "out", recipe, record_diagonals=True)
    output = quantize(source, tmp_path / "out", recipe)
    record = json.loads((output / "maca_run.json").read_text())
    assert record["method"] == "GPTQ" and len(record["modules"]) == 7


INT4 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}"
FP8 = "{num_bits: 8, type: float, symmetric: true, strategy: channel}"
GROUPS = f"{{g: {{targets: [Linear], weights: {INT4}}}}}"
MACA = f"MaCaModifier: {{ignore: [lm_head], config_groups: {GROUPS}}}"
RECIPES = {
    "two schemes": f"""
      QuantizationModifier: {{config_groups: {{g: {{targets: ['re:.*attn.*'], weights: {FP8}}}}}}}
      MaCaModifier: {{config_groups: {{h: {{targets: ['re:.*mlp.*'], weights: {INT4}}}}}}}
    """,
    "no Hessian": f"""
      QuantizationModifier: {{config_groups: {{g: {{targets: ['re:.*_proj'], weights: {FP8}}}}}}}
    """,
    "awq": f"""
      AWQModifier: {{n_grid: 4}}
      {MACA}
    """,
    "rotated": f"""
      SpinQuantModifier: {{rotations: [R1, R2], transform_type: hadamard}}
      {MACA}
    """,
    "channel as a group": f"""
      {MACA.replace("group, group_size: 32", "channel, group_size: -1")}
    """,
    "gptaq and the cache": f"""
      {MACA[:-1]}, gptaq_alpha: 0.25,
        kv_cache_scheme: {{num_bits: 8, type: float, symmetric: true, strategy: tensor}}}}
    """,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_other_modifiers(tiny_models, tmp_path, in_memory, recipe):
    """Each runs, names its schemes, and is on disk what it was in memory."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"a_stage:\n  b_modifiers:\n{RECIPES[recipe]}")
    output = quantize(tiny_models("llama", **WIDE), tmp_path / "out", file)
    schemes = {
        "two schemes": "W4A16 int, group 32, symmetric; W8A16 float, channel, symmetric",
        "no Hessian": "W8A16 float, channel, symmetric",
        "channel as a group": "W4A16 int, channel, symmetric",
    }
    scheme = json.loads((output / "maca_run.json").read_text())["scheme"]
    assert scheme == schemes.get(recipe, "W4A16 int, group 32, symmetric")
    assert len(in_memory.weights) == 14
    assert same_tokens(load(output, dequantize=True), in_memory.tokens)
    assert (output / "recipe.yaml").read_text().count("Modifier:") == RECIPES[recipe].count("Mod")


def test_rotations_at_run_time_are_written_and_not_measured(tiny_models, tmp_path):
    """Their matrices are shared by many modules; transformers loads them and leaves them out."""
    file = tmp_path / "recipe.yaml"
    rotation = "QuIPModifier: {rotations: [v, u], transform_type: hadamard}"
    file.write_text(f"a_stage:\n  b_modifiers:\n    {rotation}\n    {MACA}\n")
    source = tiny_models("llama", **WIDE)
    output = quantize(source, tmp_path / "out", file)
    with pytest.raises(UserError, match=r"rotates activations while it runs \([uv]\).*maca-serve"):
        load_dequantized(str(output), torch.device("cpu"))


def test_a_multimodal_model_runs_behind_another_modifier(tiny_models, tmp_path):
    """What is recorded again after it is not for hooks to see."""
    file = tmp_path / "recipe.yaml"
    pruning = "ConstantPruningModifier: {targets: ['re:.*mlp.*weight'], start: 0, end: 1}"
    ignore = "ignore: [lm_head, 're:.*vision.*', 're:.*multi_modal.*']"
    file.write_text(
        f"a_stage:\n  b_modifiers:\n    {pruning}\n"
        f"    {MACA.replace('ignore: [lm_head]', ignore)}\n"
    )
    output = quantize(tiny_models("gemma3", **SHAPE), tmp_path / "out", file)
    assert len(quantized_modules(output)) == 7


def test_contradictory_generation_settings_are_passed_on(tiny_models, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(tiny_models("llama", **SHAPE), source)
    settings = {"do_sample": False, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))
    output = quantize(source, tmp_path / "out")
    written = json.loads((output / "generation_config.json").read_text())
    assert {key: written.get(key, False) for key in settings} == settings


# the same again


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_models, tmp_path):
    def run(name, seed):
        output = quantize(tiny_models("llama", **SHAPE), tmp_path / name, seed=seed)
        assert not (output / "maca_diagonals.json").exists(), "nobody asked for it"
        record = json.loads((output / "maca_run.json").read_text())
        return tensors(output), record["calibration"]["sha256"]

    one, again, other = run("one", 0), run("again", 0), run("other", 1)
    assert one[1] == again[1] != other[1]
    assert one[0].keys() == again[0].keys()
    assert all(torch.equal(one[0][name], again[0][name]) for name in one[0])
    assert any(not torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_larger_batches_calibrate_on_the_same_sequences(tiny_models, tmp_path):
    source = tiny_models("llama", **SHAPE)
    losses = []
    for size in (1, 64):
        output = quantize(source, tmp_path / str(size), batch_tokens=size)
        record = json.loads((output / "maca_run.json").read_text())
        losses.append({module["name"]: module["loss"] for module in record["modules"]})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# reloading


def same_tokens(model, expected):
    return all(torch.equal(a, b) for a, b in zip(greedy(model, PROMPTS), expected, strict=True))


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_the_reloaded_model_is_the_one_in_memory(tiny_models, tmp_path, in_memory, scheme):
    """Weights bit for bit, and greedy tokens, with activations quantized where they are."""
    source = tiny_models("llama", **WIDE)
    recipe = tmp_path / "recipe.yaml"
    fields = f"{{scheme: {scheme}, ignore: [lm_head]}}"
    recipe.write_text(f"a_stage: {{b_modifiers: {{MaCaModifier: {fields}}}}}")
    output = quantize(source, tmp_path / "out", recipe)
    base, dequantized = load(source), load(output, dequantize=True)
    assert len(in_memory.weights) == 14
    for name, weight in in_memory.weights.items():
        assert not torch.equal(base.get_submodule(name).weight, weight), name
        assert torch.equal(dequantized.get_submodule(name).weight, weight), name
    assert same_tokens(load(output), in_memory.tokens)
    assert scheme == "W8A8" or same_tokens(dequantized, in_memory.tokens)
    assert scheme == "W8A8" or not same_tokens(base, in_memory.tokens), "the prompts tell nothing"


def test_mixtures_of_experts_run_and_reload(tiny_models, tmp_path, in_memory):
    """Transformers alone cannot read separate experts; it can as ``evaluate`` has it do."""
    shape = SHAPE | {"moe_intermediate_size": 64}
    output = quantize(tiny_models("qwen3_moe", **shape), tmp_path / "out")
    saved = tensors(output)
    experts = {name for name in saved if ".experts." in name and name.endswith("weight_packed")}
    assert len(experts) == 4 * 3
    assert "model.layers.0.mlp.gate.weight" in saved
    config = loading.read_config(str(output))
    with loading_separate_experts(loading.model_class_of(config), config.model_type):
        reloaded = load(output, dequantize=True)
    assert len(in_memory.weights) == 4 + 4 * 3
    for name, weight in in_memory.weights.items():
        assert torch.equal(reloaded.get_submodule(name).weight, weight), name
    assert same_tokens(reloaded, in_memory.tokens)


@pytest.mark.parametrize("stripped", [False, True])
def test_multimodal_gemma_runs_and_reloads(tiny_models, tmp_path, in_memory, stripped):
    """With its processor, or without one where the base model has lost it."""
    source = tmp_path / "base"
    shutil.copytree(tiny_models("gemma3", **SHAPE), source)
    if stripped:
        (source / "preprocessor_config.json").unlink()
    output = quantize(source, tmp_path / "out")
    assert len(quantized_modules(output)) == len(in_memory.weights) == 7
    reloaded = load(output, dequantize=True)
    assert same_tokens(reloaded, in_memory.tokens)
    for name, weight in in_memory.weights.items():
        assert torch.equal(reloaded.get_submodule(name).weight, weight), name
    assert AutoTokenizer.from_pretrained(output)("a")["input_ids"]
    if not stripped:
        assert type(AutoProcessor.from_pretrained(output)).__name__ == "Gemma3Processor"


# no folder that looks finished


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("where", "left"), [("_calibrate", []), ("_write_records", [".out.run"])])
def test_an_interrupted_run_leaves_nothing_but_finished_layers(
    tiny_models, tmp_path, monkeypatch, error, where, left
):
    def interrupted(*args):
        raise error("now")

    monkeypatch.setattr(quantize_run, where, interrupted)
    with pytest.raises(error, match="now"):
        quantize(tiny_models("llama", **SHAPE), tmp_path / "out")
    assert left_over(tmp_path) == left
    if left:
        assert not (tmp_path / ".out.run" / "checkpoint").exists()


def test_overwrite_replaces_only_when_the_new_one_is_complete(tiny_models, tmp_path, monkeypatch):
    source, output = tiny_models("llama", **SHAPE), tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"out holds what maca-llmc did not make"):
            quantize(source, output, overwrite=overwrite)
    assert left_over(output) == ["old"] and left_over(tmp_path) == ["out"]
    (output / RECORD_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"output folder .*out is not empty: .*--overwrite"):
        quantize(source, output)
    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "_write_records", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(source, output, overwrite=True)
    assert left_over(output) == ["maca_run.json", "old"]
    assert left_over(tmp_path) == [".out.run", "out"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", renaming_that_fails(Path.rename, "finished"))
        with pytest.raises(UserError, match="no rename"):
            quantize(source, output, overwrite=True)
    assert left_over(output) == ["maca_run.json", "old"]
    assert left_over(tmp_path) == [".out.run", "out"]
    quantize(source, output, overwrite=True)
    assert "old" not in left_over(output) and "model.safetensors" in left_over(output)
    assert left_over(tmp_path) == ["out"]


def renaming_that_fails(original, suffix):
    def rename(self, target):
        if self.name.endswith(suffix):
            raise OSError("no rename")
        return original(self, target)

    return rename


def test_an_empty_output_folder_is_taken(tiny_models, tmp_path):
    (tmp_path / "out").mkdir()
    assert (quantize(tiny_models("llama", **SHAPE), tmp_path / "out") / "config.json").is_file()


# checked before anything is written


def refused(source, output, match, **settings):
    before = left_over(output.parent)
    with pytest.raises(UserError, match=match):
        quantize(source, output, **settings)
    assert left_over(output.parent) == before


def test_too_little_disk_is_refused(tiny_models, tmp_path, monkeypatch):
    source = tiny_models("llama", **SHAPE)
    size = sum(tensor.nbytes for tensor in tensors(source).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - 1))
    refused(source, tmp_path / "out", r"GB free and the run may need .*--output")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    quantize(source, tmp_path / "out")


def test_an_output_that_is_a_file_or_in_one_is_refused(tiny_models, tmp_path):
    (tmp_path / "file").touch()
    source = tiny_models("llama", **SHAPE)
    refused(source, tmp_path / "file", "is a file: give a folder")
    with pytest.raises(UserError, match=r"cannot be made in .*file"):
        quantize(source, tmp_path / "file" / "out")


def test_a_container_that_nothing_needs_is_refused_before_calibration(
    tiny_models, tmp_path, monkeypatch
):
    monkeypatch.setattr(quantize_run, "_calibrate", lambda *args: 1 / 0)
    source = tiny_models("llama", **SHAPE)
    refused(source, tmp_path / "out", "for 2- and 3-bit weights .* drop it", container=4)
    refused(source, tmp_path / "out", "--container 8: only 4", container=8)


def test_a_recipe_that_quantizes_the_vision_tower_is_refused(tiny_models, tmp_path):
    recipe = ROOT / "recipes" / "w8a8.maca.yaml"
    match = r"text does not go through, first .*add 're:model.vision_tower.\*' to its ignore list"
    refused(tiny_models("gemma3", **SHAPE), tmp_path / "out", match, recipe=recipe)


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (
            "SpinQuantModifier: {rotations: [R1]}",
            "SpinQuantModifier does not take this model: C",
        ),
        ("AWQModifier: {}", "AWQModifier does not take this model: AWQ needs to match a single sm"),
    ],
)
def test_a_transform_that_does_not_know_the_model_is_named(tiny_models, tmp_path, transform, says):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"a_stage: {{b_modifiers: {{{transform}, MaCaModifier: {{scheme: W8A8, ignore: "
        "[lm_head, 're:.*vision_tower.*', 're:.*multi_modal_projector.*']}}}"
    )
    refused(tiny_models("gemma3", **SHAPE), tmp_path / "out", says, recipe=recipe)


def test_a_quantized_model_is_refused_as_a_base(checkpoint, tmp_path):
    refused(checkpoint, tmp_path / "out", "is quantized already")


def test_scales_default_to_what_the_context_allows(tiny_models, tmp_path):
    source = tiny_models("llama", **SHAPE)  # of a context of 512
    data = random_text(documents=8, length=600)
    output = quantize(source, tmp_path / "out", lengths=None, data=data, tokens=1536)
    record = json.loads((output / "maca_run.json").read_text())
    assert record["calibration"]["scales"] == [128, 256, 512]
    assert quantization_config(output)["ignore"] == ["lm_head"]
