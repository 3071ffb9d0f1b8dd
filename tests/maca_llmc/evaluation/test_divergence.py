"""KL divergence and perplexity by input length, against a float64 brute force."""

import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from checkpoints import load, quantize
from tiny import random_text, save_tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from maca_llmc import evaluate
from maca_llmc.common import defaults
from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.choices import score_questions
from maca_llmc.evaluation.questions import read_questions
from maca_llmc.model import loading

TARGETS = defaults.EVALUATION_TARGETS
LENGTHS = [40, 64]
WINDOWS = 3
TEXT = random_text(documents=2, length=140, seed=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with weights large enough for attention to matter."""
    shape = {"num_hidden_layers": 1, "initializer_range": 0.15}
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("base"), **shape)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    weights = "{num_bits: 3, strategy: group, group_size: 32}"
    (folder / "recipe.yaml").write_text(
        "a_stage: {b_modifiers: {MaCaModifier: {ignore: [lm_head], "
        f"config_groups: {{group_0: {{targets: [Linear], weights: {weights}}}}}}}}}}}"
    )
    return quantize(base, folder / "w3", folder / "recipe.yaml")


@contextmanager
def in_float32():
    """Evaluate so, for the arithmetic to be held to more than bfloat16's digits."""
    original = loading.load_model

    def load_model(source, config, dtype, **extra):
        return original(source, config, torch.float32, **extra)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "load_model", load_model)
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "who.jsonl"
    rows = [{"question": "ab" * i, "choices": ["abc", "zz"], "answer": i % 2} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def results(base, checkpoint, task):
    with in_float32():
        return evaluate(
            str(base), [checkpoint], text=TEXT, lengths=LENGTHS, windows=WINDOWS, tasks=[task]
        )


@torch.no_grad()
def brute_force(base, checkpoint, prefix=()):
    """Each window by hand, in float64: ``{length: (kl, perplexity) per checkpoint}``."""
    both = [load(base).double(), load(checkpoint, dequantize=True).double()]
    ids = [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in TEXT]
    span = LENGTHS[-1] - len(prefix)
    ends = [(ids[0], span), (ids[1], span), (ids[0], 2 * span)]
    found = {}
    for length in LENGTHS:
        kl, nll = [0.0, 0.0], [0.0, 0.0]
        for document, end in ends:
            tokens = [*prefix, *document[end - length + len(prefix) : end]]
            assert len(tokens) == length
            logs = [m(torch.tensor([tokens])).logits[0].log_softmax(-1) for m in both]
            for position in range(length - TARGETS, length):
                p, target = logs[0][position - 1], tokens[position]
                for index, q in enumerate(log[position - 1] for log in logs):
                    kl[index] += float((p.exp() * (p - q)).sum())
                    nll[index] -= float(q[target])
        count = TARGETS * len(ends)
        found[length] = [(kl[i] / count, math.exp(nll[i] / count)) for i in range(2)]
    return found


def test_against_brute_force(base, checkpoint, results):
    expected = brute_force(base, checkpoint)
    assert [entry["name"] for entry in results["checkpoints"]] == ["base", "w3"]
    for length, entries in expected.items():
        for entry, (kl, perplexity) in zip(results["checkpoints"], entries, strict=True):
            assert entry["perplexity"][str(length)]["ppl"] == pytest.approx(perplexity, rel=1e-4)
            assert entry["kl"][str(length)]["mean"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert expected[40][1][0] > 1e-3, "a divergence too small to check"
    assert abs(expected[40][0][1] - expected[64][0][1]) > 0.01, "length must matter here"


def test_the_base_against_itself_is_exactly_zero(results):
    for length in LENGTHS:
        own = results["checkpoints"][0]["kl"][str(length)]
        assert own["mean"] == own["stderr"] == 0.0 and not any(own["windows"])
        assert results["checkpoints"][1]["kl"][str(length)]["stderr"] > 0


def test_tasks_are_asked_of_base_and_checkpoint(base, checkpoint, task, results):
    questions = read_questions(task, tiny_tokenizer(), 9)
    for entry, model in zip(
        results["checkpoints"], (load(base), load(checkpoint, dequantize=True)), strict=True
    ):
        assert entry["tasks"] == {"who": score_questions(model.float(), questions, 64)}
    assert results["settings"]["tasks"] == {"who": 6}


def test_settings_are_recorded(base, results):
    settings = results["settings"]
    assert settings["base"] == str(base) and settings["special_prefix"] == []
    assert (settings["lengths"], settings["windows"], settings["targets"]) == (LENGTHS, 3, 32)
    assert results["versions"]["llmcompressor"] and results["machine"]["cores"]


def test_a_bos_token_opens_every_input_and_counts(base, checkpoint, monkeypatch):
    """Against the same brute force, with the token in front."""

    def with_bos(source):
        tokenizer = tiny_tokenizer()
        bos = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.backend_tokenizer.post_processor = bos
        return tokenizer

    monkeypatch.setattr(loading, "load_tokenizer", with_bos)
    with in_float32():
        found = evaluate(str(base), [checkpoint], text=TEXT, lengths=LENGTHS, windows=WINDOWS)
    assert found["settings"]["special_prefix"] == [1]
    for length, entries in brute_force(base, checkpoint, prefix=[1]).items():
        for entry, (_, perplexity) in zip(found["checkpoints"], entries, strict=True):
            assert entry["perplexity"][str(length)]["ppl"] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lengths": []}, "--lengths: give at least one length"),
        ({"lengths": [64, 40]}, "--lengths: 40 after 64 is not increasing"),
        ({"lengths": [64, 64]}, "--lengths: 64 after 64 is not increasing"),
        ({"lengths": [32, 64]}, "--lengths: 32 is too short .*: use at least 33"),
        ({"lengths": [64, 513]}, "--lengths: 513 is longer than the model's context 512"),
        ({"windows": 5}, "has 4 spans of 64 tokens, 5 windows were asked"),
        ({"windows": 0}, "--windows 0: give 2 or more"),
        ({"targets": 0}, "--targets 0: give 1 or more"),
        ({"targets": 40}, "--lengths: 40 is too short .*: use at least 41"),
        ({"text": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
        ({"tasks": ["/nowhere.jsonl"]}, "--tasks /nowhere.jsonl: no such file"),
        ({"tasks": ["@task", "@task"]}, "a task 'who' is there already: rename one"),
        ({"tasks": ["@long"]}, r"of 6\d\d tokens is longer than the model's context \(512\)"),
        ({"limit": 0}, "--limit 0: give 1 or more"),
        ({"device": "gpu"}, "device 'gpu'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(base, checkpoint, task, tmp_path, settings, match):
    files = {"@task": task, "@long": tmp_path / "long.jsonl"}
    row = {"question": "x" * 600, "choices": ["a", "b"], "answer": 0}
    files["@long"].write_text("\n".join([json.dumps(row)] * 2))
    given = {"text": TEXT, "lengths": LENGTHS, "windows": WINDOWS} | settings
    if "tasks" in given:
        given["tasks"] = [files.get(name, name) for name in given["tasks"]]
    with pytest.raises(UserError, match=match):
        evaluate(str(base), [checkpoint], **given)


def test_folders_that_are_no_quantized_checkpoints_are_refused(base, checkpoint, tmp_path):
    def refused(folder, match):
        with pytest.raises(UserError, match=match):
            evaluate(str(base), [checkpoint, folder], text=TEXT, lengths=LENGTHS, windows=WINDOWS)

    refused(tmp_path / "nowhere", r"nowhere is not a checkpoint .*maca-llmc quantize")
    refused(base, r"is not a quantized checkpoint: make one with maca-llmc quantize")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    refused(tmp_path, "has no safetensors weights")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, r"model\.safetensors is cut short or damaged .*make it again")
    shutil.copy(checkpoint / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot load model")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    refused(tmp_path, r"was not made from .*: vocab_size is 7 in it and \d+ in the base; give")
    refused(checkpoint, "two checkpoints are named w3: give each once")


def test_a_quantized_base_is_refused(checkpoint):
    with pytest.raises(UserError, match="is quantized already"):
        evaluate(str(checkpoint), [checkpoint], text=TEXT, lengths=LENGTHS, windows=WINDOWS)


def test_a_device_that_is_too_small_is_one_line(base, checkpoint, monkeypatch):
    def load_model(*args, **extra):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0")

    monkeypatch.setattr(loading, "load_model", load_model)
    match = (
        r"out of memory on the device \(asked for 2.50 GiB more\): lower the longest of --lengths"
    )
    with pytest.raises(UserError, match=match):
        evaluate(str(base), [checkpoint], text=TEXT, lengths=[40], windows=2)


def test_bfloat16_is_what_is_evaluated(base, checkpoint, monkeypatch):
    seen = []
    original = loading.load_model

    def watched(*args, **extra):
        seen.append(original(*args, **extra))
        return seen[-1]

    monkeypatch.setattr(loading, "load_model", watched)
    evaluate(str(base), [checkpoint], text=TEXT, lengths=[40], windows=2)
    assert [model.dtype for model in seen] == [torch.bfloat16] * 2


def test_experts_are_evaluated_as_they_are(tmp_path):
    """At 8 bits the divergence is small; experts of random numbers would be far off."""
    shape = {"num_hidden_layers": 1, "initializer_range": 0.2}
    base = save_tiny_model("qwen3_moe", tmp_path / "base", **shape)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a_stage: {b_modifiers: {MaCaModifier: {scheme: W8A8, ignore: [lm_head]}}}")
    output = quantize(base, tmp_path / "out", recipe)
    found = evaluate(str(base), [output], text=TEXT, lengths=[64], windows=2)["checkpoints"]
    assert 0 < found[1]["kl"]["64"]["mean"] < 0.05
