"""The command: bad input is one line, exit code 2 and nothing written; good input says where."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from loguru import logger
from safetensors.torch import load_file, save_file
from tiny import random_text

import maca_llmc
from maca_llmc import cli
from maca_llmc.common import defaults, record
from maca_llmc.options import Balance, Effort, QuantizeOptions, with_fields
from maca_llmc.planning import plan_table

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


HUGE = 3e38
"""A weight that is finite, while what it gives is not."""


@pytest.fixture(scope="module")
def here(tiny_models, tmp_path_factory):
    """A folder with a model, data and recipes, good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    model = shutil.copytree(tiny_models("llama", num_hidden_layers=1), folder / "model")
    shutil.copytree(model, folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()

    weights = load_file(shutil.copytree(model, folder / "huge") / "model.safetensors")
    weights["model.layers.0.post_attention_layernorm.weight"][5] = HUGE
    save_file(weights, folder / "huge" / "model.safetensors", metadata={"format": "pt"})

    rows = [json.dumps({"text": text}) for text in random_text()]
    (folder / "data.jsonl").write_text("\n".join(rows))
    (folder / "broken.jsonl").write_text("\n".join([*rows[:2], '{"text": "cut', *rows[2:]]))
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "nothing.yaml").write_text("quantize:\n  modifiers:\n    MaCaModifier: {}\n")
    text = "a_stage:\n  b_modifiers:\n    {}:\n      scheme: W8A8\n      {}\n"
    (folder / "modifier.yaml").write_text(text.format("MacaModifier", "ignore: [lm_head]"))
    (folder / "field.yaml").write_text(text.format("MaCaModifier", "exponent: 1"))
    (folder / "full").mkdir()
    (folder / "full" / "mine").touch()
    return folder


def run(monkeypatch, capsys, *words):
    """Exit code, standard output and the lines of standard error of ``maca-llmc WORDS``."""
    monkeypatch.setattr(sys, "argv", ["maca-llmc", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err.splitlines()


def tree(folder):
    return sorted(path for path in folder.rglob("*"))


def options(here, **changed):
    given = {
        "output": here / "out",
        "model": here / "model",
        "data": here / "data.jsonl",
        "lengths": "8,16,32",
        "tokens": 128,
    } | changed
    return [w for name, v in given.items() for w in (f"--{name.replace('_', '-')}", str(v))]


BAD = {
    "recipe that is not there": ({"recipe": "nowhere.yaml"}, "nowhere.yaml is no file: see"),
    "recipe that is nothing": ({"recipe": "@nothing.yaml"}, "'quantize' does not end in _stage"),
    "unknown modifier": ({"recipe": "@modifier.yaml"}, "'MacaModifier' .*Use MaCaModifier"),
    "unknown field": ({"recipe": "@field.yaml"}, "unknown field 'exponent' of MaCaModifier"),
    "no model": ({"model": "@nowhere"}, "nowhere does not exist: give a folder, a hub name"),
    "no weights": ({"model": "@weightless"}, "has no safetensors weights: save the model with"),
    "group size": (
        {"recipe": RECIPES / "w4a16-g128.maca.yaml"},
        r"group size 128 does not divide .*q_proj \(64\): 32, 16 would",
    ),
    "lengths of nothing": ({"lengths": "0,8"}, "lengths 0,8: give positive lengths such as"),
    "lengths that fall": ({"lengths": "16,8"}, "lengths 16,8 are not increasing: sort them"),
    "lengths as words": ({"lengths": "8,long"}, "--lengths '8,long': give whole numbers such as"),
    "lengths over the context": ({"lengths": "8,513"}, r"length 513 .*context \(512\): lower it"),
    "lengths over the text": (
        {"lengths": "8,81"},
        r"length 81 .*any text at hand \(80 tokens\): lo",
    ),
    "more than the data": ({"tokens": 9000}, "too little text: .*lower the token budget"),
    "no tokens": ({"tokens": 0}, "token budget is 0: give a positive number"),
    "unknown balance": (
        {"balance": "words"},
        "'words' is not one of 'tokens', 'counts'",
    ),
    "no data there": ({"data": "@nowhere.jsonl"}, "nowhere.jsonl: no such file or folder: check"),
    "empty data": ({"data": "@empty.jsonl"}, "empty.jsonl holds no text: give other data"),
    "wrong column": ({"text_column": "body"}, "line 1 has no column 'body': it has text; name"),
    "broken line": ({"data": "@broken.jsonl"}, "broken.jsonl line 3 is not JSON .*mend or remove"),
    "recipe that is a folder": ({"recipe": "@full"}, "full is no file: see recipes/"),
    "full output": (
        {"output": "@full"},
        "full holds what maca-llmc did not make",
    ),
    "output in a file": ({"output": "@data.jsonl/x"}, "cannot be made in .*give another one"),
    "unknown device": ({"device": "gpu"}, "device 'gpu': give auto, cpu, cuda or cuda:N"),
    "no such device": ({"device": "cuda:99"}, "device 'cuda:99' is not there .*--device cpu"),
    "container for nothing": ({"container": 4}, "this recipe has none: drop it"),
    "unknown container": ({"container": 8}, "--container 8: only 4 is supported"),
    "batches of nothing": ({"batch_tokens": 0}, "batch tokens are 0: give 1 or more"),
    "less than no cache": ({"cache_gb": -1.0}, "--cache-gb -1: give 0 or more"),
    "unknown option": ({"modle": "x"}, r"No such option: --modle.*\(see maca-llmc \w+ --help\)"),
    "not a number": ({"tokens": "many"}, "'--tokens': .*valid integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(here, monkeypatch, capsys, case):
    changed, message = BAD[case]
    changed = {
        name: here / value[1:] if isinstance(value, str) and value.startswith("@") else value
        for name, value in changed.items()
    }
    before = tree(here)
    code, out, lines = run(monkeypatch, capsys, "quantize", *options(here, **changed))
    assert code == 2 and out == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(message, lines[0]), lines[0]
    assert tree(here) == before


def test_infinity_in_activations_names_the_module(here, monkeypatch, capsys):
    """The bar has been shown by then: the error is the last line, and the only one of its kind."""
    before = tree(here)
    code, _, lines = run(monkeypatch, capsys, "quantize", *options(here, model=here / "huge"))
    assert code == 2
    errors = [line for line in lines if "error" in line.lower()]
    expected = "error: model.layers.0.mlp.gate_proj: its inputs hold NaN or infinity; check"
    assert len(errors) == 1 and errors == lines[-1:] and errors[0].startswith(expected), lines
    assert tree(here) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize"], "error: Missing option '--output'. (see maca-llmc quantize --help)"),
        (["quantise"], "error: No such command 'quantise'."),
        (
            ["quantize", "--output", "x", "m", "stray"],
            "error: Got unexpected extra argument(s) (stray)",
        ),
        (["evaluate", "m"], "error: Missing argument 'checkpoints'."),
    ],
)
def test_a_wrong_call_is_one_line(monkeypatch, capsys, words, message):
    code, out, lines = run(monkeypatch, capsys, *words)
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith(message), lines


@pytest.mark.parametrize("words", [[], ["--help"], ["quantize", "--help"], ["evaluate", "--help"]])
def test_help_is_no_error(monkeypatch, capsys, words):
    code, out, lines = run(monkeypatch, capsys, *words)
    assert code == 0 and "Usage: maca-llmc" in out and lines == []


def test_version_names_what_decides_the_result(monkeypatch, capsys):
    code, out, lines = run(monkeypatch, capsys, "--version")
    assert code == 0 and lines == []
    assert dict(line.split() for line in out.splitlines()) == record.versions()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_so(here, monkeypatch, capsys, number):
    def interrupted(*args, **settings):
        signal.raise_signal(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind a shell ignores it
    monkeypatch.setattr(maca_llmc, "quantize", interrupted)
    code, _, lines = run(monkeypatch, capsys, "quantize", *options(here))
    assert code == 130 and lines == ["error: interrupted"]


def test_the_command_shows_warnings_once_each_and_nothing_below_them(here, monkeypatch, capsys):
    def call(output, options):
        logger.info("chatter")
        for _ in range(2):
            logger.warning("a module was rounded")
        return here

    monkeypatch.setattr(maca_llmc, "quantize", call)
    code, _, lines = run(monkeypatch, capsys, "quantize", *options(here))
    assert code == 0 and lines == ["WARNING: a module was rounded"]


def test_a_bug_of_ours_keeps_its_traceback(here, monkeypatch):
    def broken(*args, **settings):
        raise ValueError("a bug")

    monkeypatch.setattr(maca_llmc, "quantize", broken)
    monkeypatch.setattr(sys, "argv", ["maca-llmc", "quantize", *options(here)])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_every_option_reaches_the_call(here, monkeypatch, capsys):
    """And what is not given is the options' own default."""
    seen = []

    def call(output, options):
        seen.append(options)
        output.mkdir()
        return output

    monkeypatch.setattr(maca_llmc, "quantize", call)
    assert run(monkeypatch, capsys, "quantize", "--output", here / "plain")[0] == 0
    assert seen.pop() == QuantizeOptions()
    given = options(here, recipe="r.yaml", balance="counts", text_column="t", split="s")
    given += ["--config-name", "c", "--batch-tokens", "2", "--seed", "5", "--device", "cpu"]
    given += ["--container", "4", "--whole-documents", "--overwrite", "--resume"]
    given += ["--cache-gb", "1.5", "--allow-unfused", "--record-diagonals", "--scheme", "w3a16"]
    given += ["--tune", "full", "--tune-tokens", "64"]
    assert run(monkeypatch, capsys, "quantize", *given)[0] == 0
    for folder in ("plain", "out"):
        (here / folder).rmdir()
    assert seen.pop() == QuantizeOptions(
        model=str(here / "model"),
        recipe=Path("r.yaml"),
        scheme="w3a16",
        data=str(here / "data.jsonl"),
        lengths=[8, 16, 32],
        tokens=128,
        balance=Balance.COUNTS,
        whole_documents=True,
        text_column="t",
        split="s",
        config_name="c",
        batch_tokens=2,
        seed=5,
        device="cpu",
        container=4,
        allow_unfused=True,
        record_diagonals=True,
        tune=Effort.FULL,
        tune_tokens=64,
        overwrite=True,
        cache_gb=1.5,
        resume=True,
    )


def test_the_model_is_an_argument_and_an_option(here, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(maca_llmc, "plan", lambda _, options: seen.append(options.model))
    monkeypatch.setattr(plan_table, "print_plan", lambda plan: None)
    for words in (["m"], ["--model", "m"], ["m", "--model", "m"]):
        assert run(monkeypatch, capsys, "plan", *words)[0] == 0 and seen.pop() == "m"
    code, _, lines = run(monkeypatch, capsys, "plan", "m", "--model", "n")
    assert code == 2 and lines == ["error: MODEL is 'm' and --model is 'n': give one"]


def test_lengths_were_called_scales(here, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(maca_llmc, "plan", lambda *given: seen.append(given))
    monkeypatch.setattr(plan_table, "print_plan", lambda plan: None)
    assert run(monkeypatch, capsys, "plan", "m", "--scales", "8,16")[0] == 0
    assert seen == [(None, QuantizeOptions(model="m", lengths=[8, 16]))]
    code, _, lines = run(monkeypatch, capsys, "plan", "m", "--scales", "8", "--lengths", "16")
    assert code == 2 and lines == ["error: --lengths is '16' and --scales is '8': give one"]
    assert with_fields(None, {"scales": [8]}) == QuantizeOptions(lengths=[8])
    with pytest.raises(TypeError, match="give lengths"):
        with_fields(None, {"scales": [8], "lengths": [8]})


def test_plan_takes_the_flags_of_quantize(here, monkeypatch, capsys):
    seen = []

    def call(output, options):
        seen.append((output, options))
        return {"the": "plan"}

    monkeypatch.setattr(maca_llmc, "plan", call)
    monkeypatch.setattr(plan_table, "print_plan", lambda plan: print(plan))
    code, out, _ = run(monkeypatch, capsys, "plan", "--output", here / "p", "--lengths", "8,16")
    assert code == 0 and "{'the': 'plan'}" in out
    assert seen == [(here / "p", QuantizeOptions(lengths=[8, 16]))]
    code, _, lines = run(monkeypatch, capsys, "plan", "--output", here / "p", "--length", "8")
    assert code == 2 and "--length" in lines[0]


def process(code, *words, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )


MAIN = "from maca_llmc.cli import main; main()"


def test_quantize_and_evaluate_for_real(here, monkeypatch, capsys, tmp_path):
    """In a process of its own, as installed; then the evaluation of what came out."""
    output = tmp_path / "checkpoint"
    done = process(MAIN, "quantize", *options(here, output=output))
    assert done.returncode == 0, done.stderr
    assert f"wrote {output} (" in done.stdout and f"maca-serve up {output}" in done.stdout
    assert "layer 1/1" in done.stderr and "100%" in done.stderr
    tokens = json.loads((output / "maca_run.json").read_text())["calibration"]["tokens"]
    assert f"calibrating on {tokens} tokens (count x length: " in done.stderr
    assert "Traceback" not in done.stderr and "error" not in done.stderr.lower()
    assert (output / "model.safetensors").is_file()

    results = tmp_path / "deep" / "results.json"
    row = {"question": "who", "choices": ["a bee", "no"], "answer": 1}
    (tmp_path / "who.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    words = ["--text", here / "data.jsonl", "--lengths", "40,64", "--windows", 2]
    words += ["--tasks", tmp_path / "who.jsonl", "--limit", 2]
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(
        monkeypatch, capsys, "evaluate", here / "model", output, *words, "--output", results
    )
    assert code == 0 and "KL divergence to the base" in out and "64 tokens" in out
    entries = json.loads(results.read_text())["checkpoints"]
    assert [entry["name"] for entry in entries] == ["base", "checkpoint"]
    assert f"{entries[1]['kl']['64']['mean']:.4g} ±" in out
    assert f"{entries[1]['perplexity']['40']['ppl']:.4g} ±" in out
    assert len(entries[1]["tasks"]["who"]["acc_right"]) == 2 and "accuracy by byte" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["@model", "@full"], "full is not a checkpoint .*maca-llmc quantize wrote"),
        (["@model", "@model"], "model is not a quantized checkpoint: make one with"),
        (["@nowhere", "@model"], "nowhere does not exist"),
        (["@model", "@model", "--lengths", "a"], "--lengths 'a': give whole numbers"),
        (["@model", "@model", "--output", "@full"], "full is a folder: give a file"),
        (
            ["@model", "@model", "--output", "@data.jsonl/x"],
            "cannot be written in .*data.jsonl",
        ),
    ],
)
def test_bad_input_of_evaluate_is_one_line(here, monkeypatch, capsys, words, message):
    words = [here / word[1:] if word.startswith("@") else word for word in words]
    code, out, lines = run(monkeypatch, capsys, "evaluate", "--lengths", "40", *words)
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(message, lines[0]), lines[0]


WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "llmcompressor" else find(name, *a)
"""


def test_the_wrong_environment_says_what_to_install():
    done = process(WITHOUT + MAIN, "quantize", "--output", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {maca_llmc.MISSING}\n"
    assert "llmcompressor==0.14.0.1" in maca_llmc.MISSING and "make setup" in maca_llmc.MISSING
    done = process(WITHOUT + "import maca_llmc; maca_llmc.quantize")
    assert done.returncode == 1 and done.stderr.endswith(f"ImportError: {maca_llmc.MISSING}\n")


def test_help_and_usage_errors_do_not_wait_for_torch():
    started = (
        f"import sys\ntry: exec({MAIN!r})\n"
        "finally: assert 'typer' in sys.modules and 'torch' not in sys.modules"
    )
    done = process(started, "quantize", "--help")
    assert done.returncode == 0 and "--lengths" in done.stdout, done.stderr
    done = process(started, "quantize", "--byte", "4")
    assert done.returncode == 2 and done.stderr.startswith("error: No such option: --byte")


def test_embedded_model_links_to_the_cache(tmp_path, monkeypatch, capsys):
    cached = tmp_path / "maca-llmc" / defaults.MODEL
    cached.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    link, taken = tmp_path / "demo" / "base", tmp_path / "taken"
    for _ in range(2):
        assert run(monkeypatch, capsys, "embedded-model", link)[0] == 0
        assert link.resolve() == cached
    taken.mkdir()
    code, _, lines = run(monkeypatch, capsys, "embedded-model", taken)
    assert code == 2 and "is no link" in lines[0]
