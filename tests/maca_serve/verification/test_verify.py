"""`maca-serve verify` through the fake engine, which continues everything with token 0."""

import json
import math
import os
from pathlib import Path

import cores
import four_bits
import pytest
import torch
from maca_serve import cli, verify
from maca_serve.common.errors import UserError
from maca_serve.common.ranks import Ranks
from maca_serve.formats.checkpoint import KEPT_KEYS
from maca_serve.verification import verifying
from maca_serve.verification.prompts import make_prompts
from maca_serve.verification.reference import NoReference
from maca_serve.verification.view import check_table, verdict
from packed import MODEL, write_packed
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

FOLDER = os.environ.get("MACA_TEST_CHECKPOINTS")
LAYERS = [
    {
        "quantized": True,
        "kernel": "CPUWNA16LinearKernel",
        "backend": None,
        "scheme": "CompressedTensorsWNA16",
    }
]
DIAGNOSIS = {"layers": LAYERS, "problems": []}
TOP = 10


class FakeModel:
    """What the fake engine computes where every token is 0, with noise until it is float32."""

    def __init__(self, shift=0.0):
        self.shift, self.noise = shift, 0.02

    def float(self):
        self.noise = 0.0

    def __call__(self, input_ids):
        places = input_ids.shape[1]
        probabilities = torch.zeros(places, MODEL["vocab_size"], dtype=torch.float64)
        for i, before in enumerate(input_ids[0].tolist()):
            logprob = -(1.0 + (31 * before % 97) / 50.0 + 4.0 / (i + 1))
            probabilities[i, 0] = math.exp(logprob - self.shift)
        probabilities[:, 100 : 100 + TOP] = torch.tensor([-(1.5 + i) for i in range(TOP)]).exp()
        probabilities[:, 1:100] = (1 - probabilities.sum(-1, keepdim=True)) / 99
        probabilities[:, 100 + TOP :] = 1e-12
        draw = torch.Generator().manual_seed(0)
        noise = self.noise * torch.randn(probabilities.shape, generator=draw)
        return type("Out", (), {"logits": (probabilities.log() + noise)[None]})


class ExactModel(FakeModel):
    """One that nobody needs in bfloat16."""

    def __call__(self, input_ids):
        assert self.noise == 0.0
        return super().__call__(input_ids)


@pytest.fixture
def checkpoint(tmp_path, tokenizer_files, fake_vllm, monkeypatch):
    """A folder whose engine is the fake one and whose doctor and reference are known."""
    write_packed(tmp_path / "w3", 3)
    for file in tokenizer_files.iterdir():
        (tmp_path / "w3" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(verifying, "diagnose", lambda folder, tensor_parallel: DIAGNOSIS)
    monkeypatch.setattr(verifying, "load_reference", lambda *_: FakeModel())
    return tmp_path / "w3"


def outcome(result):
    return {check["name"]: check["status"] for check in result["checks"]}


def test_verify_passes_an_engine_that_agrees(checkpoint):
    result = verify(checkpoint)
    assert json.loads(json.dumps(result)) == result
    assert result["passed"] and result["kernel"] == "CPUWNA16LinearKernel"
    assert result["prompts"] == [32] * 8 + [128] * 4
    assert outcome(result) == {
        "kernel": "pass",
        "memory of weights": "not checked",
        "finite": "pass",
        "log-probabilities, mean": "pass",
        "log-probabilities, largest": "pass",
        "KL divergence": "pass",
        "first choices": "pass",
        "greedy tokens": "pass",
        "prompts of 32 tokens": "pass",
        "prompts of 128 tokens": "pass",
        "alone and in a batch": "pass",
    }
    assert verdict(result) == "w3: 10 passed, 0 failed, 1 not checked"


@cores.two_needed
def test_verify_with_ranks_asks_for_them(checkpoint, monkeypatch):
    asked = []

    def diagnose(folder, tensor_parallel):
        asked.append(tensor_parallel)
        return DIAGNOSIS

    started = []
    monkeypatch.setattr(verifying, "diagnose", diagnose)
    monkeypatch.setattr(verifying, "check_ranks", lambda checkpoint, ranks: asked.append(ranks))
    engine = verifying.Engine
    monkeypatch.setattr(
        verifying, "Engine", lambda c, settings: started.append(settings) or engine(c, settings)
    )
    result = verify(checkpoint, tensor_parallel=2)
    assert result["passed"] and result["ranks"] == 2
    assert asked == [Ranks(2), 2]
    at = started[0].arguments.index("--tensor-parallel-size")
    assert started[0].arguments[at + 1] == "2"
    memory = next(check for check in result["checks"] if check["name"] == "memory of weights")
    assert memory["found"].startswith("2 ranks hold parts")


def test_verify_refuses_ranks_that_do_not_divide(checkpoint):
    with pytest.raises(UserError, match="--tp: 4 attention heads cannot be shared by 3"):
        verify(checkpoint, tensor_parallel=3)


def test_verify_fails_an_engine_that_computes_something_else(checkpoint, monkeypatch):
    monkeypatch.setattr(verifying, "load_reference", lambda *_: FakeModel(shift=0.5))
    result = verify(checkpoint)
    assert not result["passed"]
    assert outcome(result)["log-probabilities, mean"] == "fail"
    assert outcome(result)["alone and in a batch"] == "pass"


def test_verify_fails_answers_that_depend_on_the_batch(checkpoint, fake_vllm):
    fake_vllm("depends on the batch")
    failed = [name for name, status in outcome(verify(checkpoint)).items() if status == "fail"]
    assert failed == ["alone and in a batch"]


def test_verify_fails_another_kernel(checkpoint, monkeypatch):
    other = {"layers": [{**LAYERS[0], "kernel": "MarlinLinearKernel"}], "problems": []}
    monkeypatch.setattr(verifying, "diagnose", lambda folder, tensor_parallel: other)
    assert outcome(verify(checkpoint))["kernel"] == "fail"


def test_verify_refuses_a_scale_that_is_no_number(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][3, 4] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name}: holds NaN or infinity"):
        verify(checkpoint)


def test_verify_refuses_what_the_doctor_refuses(checkpoint, monkeypatch):
    problem = {
        "severity": "error",
        "what": "missing",
        "cure": "again",
        "modules": ["a.b", "a.c"],
        "count": 2,
    }
    found = {"layers": LAYERS, "problems": [problem]}
    monkeypatch.setattr(verifying, "diagnose", lambda folder, tensor_parallel: found)
    with pytest.raises(UserError, match=r"w3: missing \(a\.b and 1 more\): again"):
        verify(checkpoint)


@pytest.mark.parametrize("fault", ["nan", "minus infinity"])
def test_verify_fails_broken_numbers_of_the_engine(checkpoint, fake_vllm, fault):
    fake_vllm(fault)
    result = verify(checkpoint)
    assert outcome(result)["finite"] == "fail" and outcome(result)["kernel"] == "pass"
    assert outcome(result)["agreement"] == "not checked"


def test_verify_fails_broken_numbers_of_the_checkpoint(checkpoint, monkeypatch):
    monkeypatch.setattr(verifying, "load_reference", lambda *_: FakeModel(shift=math.nan))
    assert outcome(verify(checkpoint))["finite reference"] == "fail"


def test_verify_says_what_was_not_checked(checkpoint, monkeypatch):
    def none(checkpoint, dtype):
        raise NoReference("its activations are quantized too")

    monkeypatch.setattr(verifying, "load_reference", none)
    result = verify(checkpoint)
    assert result["passed"]
    agreement = next(check for check in result["checks"] if check["name"] == "agreement")
    assert agreement["status"] == "not checked"
    assert agreement["found"] == "no reference: its activations are quantized too"
    assert verdict(result) == (
        "w3: 2 passed, 0 failed, 3 not checked; its answers were compared with nothing:"
        " no reference: its activations are quantized too"
    )


def test_verify_with_a_base(checkpoint, monkeypatch, make_checkpoint):
    shape = {key: MODEL[key] for key in KEPT_KEYS}
    base = make_checkpoint("base", quantized=False, **shape)
    models = {"w3": FakeModel, "base": lambda: ExactModel(shift=1.0)}
    monkeypatch.setattr(verifying, "load_reference", lambda found, dtype: models[found.name]())
    result = verify(checkpoint, base=base)
    assert outcome(result)["nearer to it than to the base"] == "pass"
    other = make_checkpoint("other", quantized=False, **{**shape, "vocab_size": 7})
    with pytest.raises(UserError, match=r"--base: .*other has vocab_size 7 and .*w3 202; give"):
        verify(checkpoint, base=other)


def test_a_context_that_is_too_short(checkpoint):
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 40}))
    with pytest.raises(UserError, match="its context of 40 tokens is too short"):
        make_prompts(verifying.open_checkpoint(checkpoint))


def test_verify_by_command(checkpoint, fake_vllm):
    fake_vllm("depends on the batch")
    done = CliRunner().invoke(cli.app, ["verify", str(checkpoint), "--json"])
    assert done.exit_code == 1
    assert outcome(json.loads(done.stdout))["alone and in a batch"] == "fail"


def test_the_table_shows_every_check_and_its_limit(checkpoint):
    result = verify(checkpoint)
    console = Console(width=150, record=True)
    console.print(check_table(result))
    text = console.export_text()
    assert all(check["name"] in text for check in result["checks"])
    assert "not checked" in text and "x bfloat16 alone" in text


@pytest.mark.engine
@pytest.mark.skipif(FOLDER is None, reason="MACA_TEST_CHECKPOINTS names no folder")
@pytest.mark.parametrize("name", [pytest.param("w3-in-4", marks=four_bits.needed), "w8a8"])
def test_verify_passes_a_real_checkpoint_in_the_real_engine(name):
    result = verify(Path(FOLDER, name), base=Path(FOLDER, "base"))
    print(*(f"{c['name']}: {c['status']} {c['found']}" for c in result["checks"]), sep="\n")
    assert result["passed"]
    names = [name for name, status in outcome(result).items() if status == "pass"]
    assert {"kernel", "log-probabilities, mean", "prompts of 2048 tokens"} <= set(names)
