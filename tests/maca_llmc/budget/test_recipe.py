"""A budget on tiny models: what is written meets it, and vLLM's fused parts agree."""

import json
import re
import sys

import pytest
from tiny import WIDE, random_text, save_tiny_model

import maca_llmc
from maca_llmc import cli
from maca_llmc.budget.parts import expressions, find_parts
from maca_llmc.budget.recipe import frontier
from maca_llmc.common.errors import UserError
from maca_llmc.options import QuantizeOptions
from maca_llmc.recipe.targets import default_ignore
from maca_llmc.tuning.checkpoint import read_weights

GIVEN = {"data": random_text(documents=40, length=80), "lengths": [16, 32], "tokens": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), **WIDE)


def test_parts_are_what_vllm_makes_one_of(tiny_model):
    shapes = tiny_model("qwen3_moe")
    parts = find_parts(shapes, default_ignore(shapes))
    ends = {tuple(name.rpartition(".")[2] for name in part.names) for part in parts}
    assert ("q_proj", "k_proj", "v_proj") in ends and ("o_proj",) in ends
    assert all(len(part.names) % 3 == 0 for part in parts if "experts" in part.names[0])
    assert not any("mlp.gate." in f"{name}." for part in parts for name in part.names)


def test_expressions_match_these_layers_whatever_stands_before():
    names = [f"model.layers.{n}.mlp.{kind}" for n in (1, 12) for kind in ("up_proj", "gate_proj")]
    found = expressions(names)
    assert len(found) == 2

    def matches(name):
        return any(re.match(entry[3:], name) for entry in found)

    assert all(matches(name) and matches(f"language_model.{name}") for name in names)
    assert not matches("model.layers.2.mlp.up_proj") and not matches("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("bits", [3.0, 4.6])
def test_what_is_written_meets_the_budget(model, tmp_path, bits):
    output = maca_llmc.quantize(
        tmp_path / "out", model=str(model), bits=bits, choose="W2A16,W3A16,W4A16,W8A16", **GIVEN
    )
    weights = read_weights(output)
    count = sum(weight.codes.numel() for weight in weights.values())
    levels = {name: len(weight.codes.unique()) for name, weight in weights.items()}
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    of = {}
    for group in config["config_groups"].values():
        args = group["weights"]
        for target in group["targets"]:
            of |= {n: args for n in weights if re.match(target.removeprefix("re:"), n)}
    assert of.keys() == weights.keys()
    taken = sum(
        weight.codes.numel() * of[name]["num_bits"] + 16 * weight.scale.numel()
        for name, weight in weights.items()
    )
    assert bits * 0.9 < taken / count <= bits
    assert all(levels[name] <= 2 ** of[name]["num_bits"] for name in weights)
    for name in weights:
        if name.endswith("q_proj"):
            for other in ("k_proj", "v_proj"):
                assert of[name.replace("q_proj", other)] == of[name]


def test_a_size_is_that_of_the_whole_checkpoint(model, tmp_path):
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    given = int(files * 0.8)
    output = maca_llmc.quantize(tmp_path / "out", model=str(model), size=f"{given}B", **GIVEN)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    headers = 20_000  # names and shapes of tensors, which a real model's size hides
    assert written <= given + headers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 1.0}, "the smallest of --choose takes"),
        ({"bits": -1.0}, "--bits -1: give bits a weight"),
        ({"size": "much"}, "--size much: give a size such as 5.2GB"),
        ({"size": "1KB"}, "--size 1KB: what stays unquantized takes"),
        ({"bits": 4.0, "size": "1GB"}, "--bits 4 and --size 1GB: give one"),
        ({"bits": 4.0, "scheme": "W4A16"}, "drop --recipe and --scheme"),
        ({"bits": 4.0, "choose": "FP8"}, "--choose FP8: a budget takes weights of integers"),
        ({"choose": "W4A16"}, "--choose W4A16: give --bits or --size with it"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(model, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        maca_llmc.quantize(tmp_path / "out", model=str(model), **GIVEN | given)
    assert not list(tmp_path.iterdir())


def test_the_frontier_falls_and_plan_shows_the_choice(model, tmp_path, monkeypatch, capsys):
    found = frontier(QuantizeOptions(model=str(model), **GIVEN), points=5)
    bits, expected = zip(*found, strict=True)
    assert list(bits) == sorted(bits) and list(expected) == sorted(expected, reverse=True)
    plan = maca_llmc.plan(tmp_path / "out", model=str(model), bits=4.0, **GIVEN)
    assert len(plan["modules"]) > 1
    words = ["plan", str(model), "--frontier", "--tokens", "256", "--lengths", "16,32"]
    monkeypatch.setattr(sys, "argv", ["maca-llmc", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and f"{bits[0]:.3f}" in capsys.readouterr().out
