"""Runs that are killed, and go on: their tensors are those of a run that was not."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import quantize as quantize_plainly
from checkpoints import tensors
from loguru import logger
from transformers import AutoModelForCausalLM

from maca_llmc.common.errors import UserError
from maca_llmc.common.record import RECORD_FILE
from maca_llmc.run import quantize_run
from maca_llmc.run.resume import LayerKeeper
from maca_llmc.run.state import RunState

ROOT = Path(__file__).parents[3]
LAYERS = 3
SHAPE = {"num_hidden_layers": LAYERS}

KILLED = """
import os, signal, sys
from pathlib import Path
from checkpoints import quantize
from maca_llmc.model import loading
from maca_llmc.run import quantize_run, state
from maca_llmc.run.resume import LayerKeeper

def kill_at(owner, name, when, after=False):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        result = original(*args, **kwargs) if after else None
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else original(*args, **kwargs)
    setattr(owner, name, patched)

moment = sys.argv[3]
if moment == "before the first layer counts":
    kill_at(state.RunState, "_write", lambda self, name, content: name == "progress.json")
elif moment == "before the second layer counts":
    kill_at(state.RunState, "_write",
            lambda self, name, content: name == "progress.json" and len(content["layers"]) == 2)
elif moment == "after the second layer":
    kill_at(LayerKeeper, "keep", lambda self, layer: self.finished == 2, after=True)
elif moment == "while saving":
    kill_at(loading, "save_model", lambda *args: True, after=True)
elif moment == "before it is renamed":
    kill_at(Path, "rename", lambda self, target: self.name == "checkpoint")
elif moment == "before it is put in place":
    kill_at(Path, "rename", lambda self, target: self.name == "finished")
elif moment == "before it is tidied up":
    kill_at(state.RunState, "close", lambda *args: True)
quantize(sys.argv[1], Path(sys.argv[2]), overwrite=True, record_diagonals=True)
"""


def quantize(*places, record_diagonals=True, **settings):
    return quantize_plainly(*places, record_diagonals=record_diagonals, **settings)


def start_killed(source, output, moment):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(output), moment],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


def same_tensors(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def source(tiny_models):
    return tiny_models("llama", **SHAPE)


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    return quantize(source, tmp_path_factory.mktemp("unbroken") / "out")


@pytest.fixture
def said():
    """Warnings of a run, as a program that calls it has them."""
    messages = []
    handle = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(handle)  # fails where the run has removed it


@pytest.mark.parametrize(
    ("moment", "finished"),
    [
        ("before the first layer counts", 0),
        ("before the second layer counts", 1),
        ("after the second layer", 2),
        ("while saving", LAYERS),
        ("before it is renamed", LAYERS),
        ("before it is put in place", LAYERS),
        ("before it is tidied up", LAYERS),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    source, unbroken, tmp_path, moment, finished, capsys
):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("old", RECORD_FILE):
        (output / name).touch()
    start_killed(source, output, moment)
    state = tmp_path / ".out.run"
    progress = state / "progress.json"
    layers = json.loads(progress.read_text())["layers"] if progress.exists() else []
    assert len(layers) == finished
    calibrated = []
    with pytest.MonkeyPatch.context() as patched:
        original = LayerKeeper.keep
        patched.setattr(
            LayerKeeper,
            "keep",
            lambda self, layer: (calibrated.append(self.finished), original(self, layer)),
        )
        quantize(source, output, resume=True, overwrite=True)
    assert calibrated == list(range(finished, LAYERS)), "finished layers are not done again"
    said = f"{finished} of {LAYERS} layers are finished already"
    # then there is nothing left to run
    done = moment in ("before it is put in place", "before it is tidied up")
    assert (said in capsys.readouterr().err) == (finished > 0 and not done)
    same_tensors(output, unbroken)
    assert left_over(tmp_path) == ["out"] and not (output / "old").exists()
    records = [json.loads((folder / "maca_run.json").read_text()) for folder in (output, unbroken)]
    assert records[0]["modules"] == records[1]["modules"]
    diagonals = [(folder / "maca_diagonals.json").read_text() for folder in (output, unbroken)]
    assert diagonals[0] == diagonals[1]


class StopError(Exception):
    """Ends a run after a layer, as a kill would."""


def interrupt_after(monkeypatch, layers):
    original = LayerKeeper.keep

    def keep(self, layer):
        original(self, layer)
        if self.finished == layers:
            raise StopError

    monkeypatch.setattr(LayerKeeper, "keep", keep)


@pytest.fixture
def killed(source, tmp_path, monkeypatch):
    """The output of a run that ended after its first layer."""
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(StopError):
            quantize(source, tmp_path / "out")
    return tmp_path / "out"


RECIPE = "a_stage: {b_modifiers: {%s: {%s, ignore: [lm_head]}}}"
WEIGHTS = "config_groups: {g: {targets: [Linear], weights: {%s}%s}}"
RECIPES = {
    "weight ordering": (
        "MaCaModifier",
        WEIGHTS % ("num_bits: 4, strategy: group, group_size: 32, actorder: weight", ""),
    ),
    "asymmetric": (
        "MaCaModifier",
        WEIGHTS % ("num_bits: 3, strategy: group, group_size: 32, symmetric: false", ""),
    ),
    "static activations": (
        "MaCaModifier",
        WEIGHTS
        % (
            "num_bits: 8, strategy: channel",
            ", input_activations: {num_bits: 8, strategy: tensor, dynamic: false}",
        ),
    ),
    "GPTAQ, scales by Hessian": (
        "MaCaModifier",
        "gptaq_alpha: 0.5, hessian_scales: true, "
        + WEIGHTS % ("num_bits: 3, strategy: group, group_size: 32, symmetric: true", ""),
    ),
    "nested": ("MaCaModifier", "scheme: W8A8, nested_scales: [4, 8]"),
    "stock GPTQ": ("GPTQModifier", "scheme: W8A8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_layer_is_restored(source, tmp_path, monkeypatch, name):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE % RECIPES[name])
    unbroken = quantize_plainly(source, tmp_path / "unbroken", recipe)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        with pytest.raises(StopError):
            quantize_plainly(source, tmp_path / "out", recipe)
    same_tensors(quantize_plainly(source, tmp_path / "out", recipe, resume=True), unbroken)


def test_the_full_precision_stream_of_finished_layers_is_behind_the_smoother(
    source, tmp_path, monkeypatch
):
    """In bfloat16, where a smoothed layer rounds otherwise than one that was not."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 + 2 * torch.rand_like(parameter) if "norm" in name else 6)
    model.save_pretrained(tmp_path / "model")
    for file in source.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    weights = WEIGHTS % ("num_bits: 4, strategy: group, group_size: 32", "")
    smoother = "SmoothQuantModifier: {smoothing_strength: 0.5}"
    maca = f"MaCaModifier: {{gptaq_alpha: 0.5, {weights}, ignore: [lm_head]}}"
    recipe.write_text(f"a_stage: {{b_modifiers: {{{smoother}, {maca}}}}}")
    unbroken = quantize(tmp_path / "model", tmp_path / "unbroken", recipe)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(StopError):
            quantize(tmp_path / "model", tmp_path / "out", recipe)
    same_tensors(quantize(tmp_path / "model", tmp_path / "out", recipe, resume=True), unbroken)


def test_a_checkpoint_moved_out_of_the_way_by_a_killed_run_is_put_back(source, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("old", RECORD_FILE):
        (output / name).touch()
    start_killed(source, output, "before it is put in place")
    assert not output.exists()
    match = "holds a finished checkpoint .* go on with --resume, or start anew"
    with pytest.raises(UserError, match=match):
        quantize(source, output)
    assert (output / "old").exists()


def test_experts_are_restored(tiny_models, tmp_path, monkeypatch):
    source = tiny_models("qwen3_moe", moe_intermediate_size=64)
    unbroken = quantize(source, tmp_path / "unbroken")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(StopError):
            quantize(source, tmp_path / "out")
    same_tensors(quantize(source, tmp_path / "out", resume=True), unbroken)


def test_hidden_states_on_disk_change_nothing(source, unbroken, tmp_path, monkeypatch):
    spilled = []
    original = quantize_run.HiddenStates.put

    def put(self, index, hidden):
        original(self, index, hidden)
        spilled.append(self.spilled_bytes)

    monkeypatch.setattr(quantize_run.HiddenStates, "put", put)
    same_tensors(quantize(source, tmp_path / "out", cache_gb=0), unbroken)
    assert all(spilled) and left_over(tmp_path) == ["out"]


def test_without_resume_a_killed_run_is_in_the_way_and_says_what_to_do(source, killed, unbroken):
    with pytest.raises(UserError, match=r"holds 1 finished layers .*--resume, or .*--overwrite"):
        quantize(source, killed)
    same_tensors(quantize(source, killed, overwrite=True), unbroken)
    assert left_over(killed.parent) == ["out"]


def test_nothing_to_resume_is_a_run_from_the_start_and_said(source, unbroken, tmp_path, said):
    same_tensors(quantize(source, tmp_path / "out", resume=True), unbroken)
    assert f"nothing to resume in {tmp_path / '.out.run'}: starting anew" in said


def failing_rename(monkeypatch, number, when):
    """Have a rename fail as the operating system has it fail."""
    original = Path.rename

    def rename(self, target):
        if when(self):
            raise OSError(number, os.strerror(number))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_checkpoint_that_cannot_be_put_in_place_is_kept(
    source, unbroken, tmp_path, monkeypatch, number, replaced
):
    output, finished = tmp_path / "out", tmp_path / ".out.run" / "finished"
    if replaced:
        output.mkdir()
        for name in ("old", RECORD_FILE):
            (output / name).touch()
    match = rf"is finished and cannot be renamed to {output} \({os.strerror(number)}\): it is in"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=match) as caught:
        failing_rename(patched, number, lambda path: path.name == "finished")
        quantize(source, output, overwrite=replaced)
    assert str(finished) in str(caught.value) and "\n" not in str(caught.value)
    same_tensors(finished, unbroken)
    assert left_over(output) == [RECORD_FILE, "old"] if replaced else not output.exists()
    monkeypatch.setattr(quantize_run, "_calibrate", lambda *_: pytest.fail("all is finished"))
    same_tensors(quantize(source, output, resume=True, overwrite=replaced), unbroken)
    assert left_over(tmp_path) == ["out"]


def test_what_came_to_the_output_meanwhile_is_not_replaced(source, unbroken, tmp_path, monkeypatch):
    output = tmp_path / "out"
    original = quantize_run._calibrate

    def calibrate(*args):
        output.mkdir()
        (output / "mine").touch()
        return original(*args)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="it is not empty"):
        patched.setattr(quantize_run, "_calibrate", calibrate)
        quantize(source, output, overwrite=True)
    assert left_over(output) == ["mine"]
    (output / "mine").unlink()
    same_tensors(quantize(source, output, resume=True), unbroken)


def test_a_link_stays_and_its_target_is_made(source, unbroken, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "out")
    for overwrite in (False, True):
        assert quantize(source, link, overwrite=overwrite) == link
        assert link.is_symlink() and left_over(tmp_path / "disk") == ["out"]
    same_tensors(link, unbroken)


@pytest.mark.parametrize(
    ("change", "named"),
    {
        "seed": ({"seed": 5}, "--seed was 0 and is 5 now"),
        "scales": ({"lengths": [8, 32]}, r"--lengths was \[.*\] and is \[8, 32\] now"),
        "data": ({"tokens": 64}, r"data \(--data, --tokens, ...\) was"),
        "batches": ({"batch_tokens": 8}, "--batch-tokens was 2048 and is 8 now"),
        "diagonals": ({"record_diagonals": False}, "--record-diagonals was True and is False now"),
        "recipe": (
            {"recipe": ROOT / "recipes" / "w8a8.maca.yaml"},
            r"recipe was \S.* and is \S.* now",
        ),
    }.values(),
    ids=["seed", "scales", "data", "batches", "diagonals", "recipe"],
)
def test_another_run_is_refused_and_the_difference_named(source, killed, change, named):
    with pytest.raises(UserError, match=f"cannot resume: {named}"):
        quantize(source, killed, **change, resume=True)


def test_another_model_is_refused(tiny_models, killed):
    with pytest.raises(UserError, match=r"cannot resume: (model|weights) was"):
        quantize(tiny_models("llama", **SHAPE, rms_norm_eps=1e-4), killed, resume=True)


def test_other_versions_and_threads_are_refused(source, killed, monkeypatch):
    identity = json.loads((killed.parent / ".out.run" / "identity.json").read_text())
    for key in ("torch version", "threads", "--device", "processor"):
        assert key in identity
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="cannot resume: threads was 1 and is 2 now"):
            quantize(source, killed, resume=True)
    finally:
        torch.set_num_threads(1)


def test_a_damaged_layer_is_refused(source, killed):
    path = killed.parent / ".out.run" / "layer-0000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"layer-0000\.safetensors is damaged: start anew"):
        quantize(source, killed, resume=True)


def test_damaged_progress_is_refused(source, killed):
    path = killed.parent / ".out.run" / "progress.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=r"progress\.json is damaged: start anew"):
        quantize(source, killed, resume=True)


def test_two_runs_at_once_are_refused(source, tmp_path):
    state = RunState(tmp_path / "out", {"model": "other"})
    try:
        with pytest.raises(UserError, match=r"another run is writing .*out"):
            quantize(source, tmp_path / "out")
    finally:
        state.close(keep=False)
    assert left_over(tmp_path) == []


def test_a_full_disk_is_named_and_what_was_finished_stays(source, tmp_path, monkeypatch, unbroken):
    with monkeypatch.context() as patched:
        original = RunState.save_layer

        def full(self, tensors, content):
            if self.finished == 2:
                raise OSError(28, "No space left on device")
            original(self, tensors, content)

        patched.setattr(RunState, "save_layer", full)
        with pytest.raises(UserError, match=r"no space left on the disk .*--resume"):
            quantize(source, tmp_path / "out")
    same_tensors(quantize(source, tmp_path / "out", resume=True), unbroken)


def test_memory_that_runs_out_is_named(source, tmp_path, monkeypatch):
    def large(*args):
        torch.empty(10**15)

    monkeypatch.setattr(LayerKeeper, "keep", large)
    expected = r"out of memory \(asked for 4000000000000000 bytes more\): lower --cache-gb"
    with pytest.raises(UserError, match=expected):
        quantize(source, tmp_path / "out")
