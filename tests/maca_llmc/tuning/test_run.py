"""Tuning from folder to folder, on a tiny model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WIDE, random_text, save_tiny_model

import maca_llmc
from maca_llmc.common.errors import UserError
from maca_llmc.common.record import RECORD_FILE
from maca_llmc.evaluation.divergence import load_dequantized
from maca_llmc.tuning import run as tuning_run
from maca_llmc.tuning.checkpoint import read_weights, write_weights
from maca_llmc.tuning.options import BlockOptions, EndToEndOptions

SETTINGS = {"lengths": (32, 64), "tokens": 2048}
TEXT = random_text(documents=80, length=80)


def recipe(bits: int, symmetric: bool, modifier: str = "MaCaModifier", group: int = 32) -> str:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    group_0 = {"targets": ["Linear"], "weights": weights}
    fields = {"config_groups": {"group_0": group_0}, "ignore": ["lm_head"]}
    return json.dumps({"quantize_stage": {"quantize_modifiers": {modifier: fields}}})


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("base"), **WIDE)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return path


@pytest.fixture(scope="session")
def quantized(base, data, tmp_path_factory):
    """A checkpoint by bits, symmetry, modifier and group size, made on first use."""
    made = {}

    def get(*key, **options):
        name = (key, *options.items())
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized")
            path = folder / "recipe.yaml"
            path.write_text(recipe(*key))
            made[name] = maca_llmc.quantize(
                folder / "checkpoint",
                model=str(base),
                recipe=path,
                data=data,
                scales=(32, 64),
                tokens=1024,
                **options,
            )
        return made[name]

    return get


@pytest.fixture
def tune(base, data, tmp_path):
    def call(checkpoint, name="tuned", **options):
        return maca_llmc.tune(
            checkpoint, tmp_path / name, base=str(base), data=data, **SETTINGS | options
        )

    return call


@pytest.fixture
def steps(monkeypatch):
    """Set what the stages do."""

    def put(blocks: dict, end_to_end: dict):
        monkeypatch.setattr(tuning_run, "BlockOptions", lambda: BlockOptions(**blocks))
        monkeypatch.setattr(tuning_run, "EndToEndOptions", lambda: EndToEndOptions(**end_to_end))

    return put


def tensors(folder):
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def divergence(base, checkpoint, data):
    found = maca_llmc.evaluate(
        str(base), [checkpoint], text=str(data), lengths=(64,), windows=8, targets=32
    )
    return found["checkpoints"][1]["kl"]["64"]["mean"]


def test_both_stages_bring_the_model_nearer(base, data, quantized, tune):
    checkpoint = quantized(2, False)
    tuned = tune(checkpoint)
    assert divergence(base, tuned, data) < 0.9 * divergence(base, checkpoint, data)
    content = json.loads((tuned / RECORD_FILE).read_text())
    assert content["tuning"]["blocks"] and content["tuning"]["held_out_kl"]
    assert content["scheme"] == json.loads((checkpoint / RECORD_FILE).read_text())["scheme"]
    assert "## Tuned" in (tuned / "README.md").read_text()
    before, after = tensors(checkpoint), tensors(tuned)
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }


def test_without_blocks_only_scales_change(quantized, tune):
    checkpoint = quantized(3, False)
    before, after = tensors(checkpoint), tensors(tune(checkpoint, blocks=False))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.endswith("weight_scale") for key in changed)


def test_zero_steps_give_the_input_back(quantized, tune, steps):
    steps({"steps": 0}, {"rate": 0.0})
    checkpoint = quantized(3, True)
    tuned = tune(checkpoint)
    for path in checkpoint.glob("*.safetensors"):
        assert (tuned / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ((4, True, "GPTQModifier"), {}),
        ((8, True, "MaCaModifier", 0), {}),
        ((3, True, "MaCaModifier", 64), {"container": 4}),
    ],
)
def test_other_checkpoints(quantized, tune, steps, key, options):
    steps({"steps": 3}, {})
    checkpoint = quantized(*key, **options)
    weights, tuned = read_weights(checkpoint), read_weights(tune(checkpoint))
    assert weights.keys() == tuned.keys()
    for name, weight in weights.items():
        low, high = weight.limits
        assert low <= tuned[name].codes.min() and tuned[name].codes.max() <= high


@pytest.mark.parametrize("key", [(2, False), (3, True), (4, False), (5, True), (8, True)])
def test_weights_read_are_those_that_transformers_dequantizes(quantized, key):
    checkpoint = quantized(*key)
    model = load_dequantized(str(checkpoint), torch.device("cpu"))
    for name, weight in read_weights(checkpoint).items():
        expected = model.get_submodule(name).weight
        weight = replace(weight, scale=weight.scale.to(expected.dtype))  # as it was loaded
        assert torch.equal(weight.dequantized().to(expected.dtype), expected)


def test_perturbed_scales_are_brought_back(base, data, quantized, tune, steps, tmp_path):
    steps({}, {"step_tokens": 64, "rate": 0.03, "epochs": 4})
    checkpoint = quantized(4, False)
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: weight.with_scale(0.3 * torch.randn(weight.scale.shape, generator=generator))
        for name, weight in read_weights(checkpoint).items()
    }
    shutil.rmtree(damaged)
    damaged.mkdir()
    write_weights(checkpoint, damaged, weights)
    tuned = tune(damaged, blocks=False)
    assert divergence(base, tuned, data) < 0.5 * divergence(base, damaged, data)


@pytest.mark.parametrize("kill", ["layer", "look"])
def test_a_killed_run_goes_on_bit_for_bit(quantized, tune, monkeypatch, kill):
    checkpoint = quantized(3, False)
    whole = tune(checkpoint, "whole")

    class Killed(BaseException):
        pass

    if kill == "layer":
        original = tuning_run.LayerKeeper.keep

        def keep(self, *args):
            original(self, *args)
            raise Killed

        monkeypatch.setattr(tuning_run.LayerKeeper, "keep", keep)
    else:
        save = tuning_run.save_progress

        def save_once(*args):
            save(*args)
            raise Killed

        monkeypatch.setattr(tuning_run, "save_progress", save_once)
    with pytest.raises(Killed):
        tune(checkpoint, "killed")
    monkeypatch.undo()
    resumed = tune(checkpoint, "killed", resume=True)
    before, after = tensors(whole), tensors(resumed)
    assert all(torch.equal(before[key], after[key]) for key in before)
    records = [json.loads((f / RECORD_FILE).read_text())["tuning"] for f in (whole, resumed)]
    assert records[0]["held_out_kl"] == records[1]["held_out_kl"]


def test_another_setting_is_not_resumed(quantized, tune, monkeypatch):
    checkpoint = quantized(3, False)
    monkeypatch.setattr(tuning_run, "_write", lambda *_: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        tune(checkpoint)
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot resume: data was"):
        tune(checkpoint, resume=True, seed=1)


def test_refusals(base, quantized, tune, tmp_path):
    with pytest.raises(UserError, match="not a quantized checkpoint"):
        tune(base)
    with pytest.raises(UserError, match="nothing is left"):
        tune(quantized(3, False), blocks=False, end_to_end=False)
    with pytest.raises(UserError, match="none can be held out"):
        tune(quantized(3, False), lengths=(64,), tokens=64)
    old = tmp_path / "old"
    shutil.copytree(quantized(3, False), old)
    path = old / "model.safetensors"
    content = load_file(path)
    name = next(key for key in content if key.endswith("weight_packed"))
    content[name] = torch.cat([content[name], content[name][:, :1]], dim=1)
    save_file(content, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="layout of compressed-tensors before"):
        tune(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
