"""The state folder: who holds it, and what is never removed from it."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from maca_llmc.common.errors import UserError
from maca_llmc.run.state import RunState

RUN = {"model": "base"}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


def finish(state):
    partial = state.folder / "checkpoint"
    partial.mkdir()
    (partial / "new").touch()
    state.complete(partial)


def test_only_one_of_two_that_waited_for_a_lock_gets_it(output, monkeypatch):
    """The one opens the lock of a run that ends, and is overtaken before it takes it."""
    first = RunState(output, RUN)
    overtaking = []
    original = fcntl.flock

    def flock(file, how):
        if not overtaking and how & fcntl.LOCK_EX:
            overtaking.append(None)
            first.close(keep=False)
            overtaking[0] = RunState(output, RUN)
        return original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another run is writing"):
        RunState(output, RUN)
    overtaking[0].close(keep=False)
    assert left_over(output.parent) == []


def test_a_folder_is_not_removed_under_a_run_that_has_just_begun(output, monkeypatch):
    first = RunState(output, RUN)
    later = []
    original = os.unlink

    def unlink(path, **kwargs):
        original(path, **kwargs)
        if Path(path).name == "lock" and not later:
            later.append(RunState(output, RUN))

    monkeypatch.setattr(os, "unlink", unlink)
    first.close(keep=False)
    assert {"lock", "identity.json"} <= set(left_over(output.parent / ".out.run"))
    with pytest.raises(UserError, match="another run is writing"):
        RunState(output, RUN)
    later[0].close(keep=False)


def test_who_does_not_get_in_leaves_all_as_it_was(output):
    state = RunState(output, RUN)
    state.save_layer({"a": torch.ones(1)}, {})
    finish(state)
    state.close(keep=True)
    before = left_over(state.folder)
    for change in ({}, {"resume": True}):
        with pytest.raises(UserError, match=r"finished checkpoint|cannot resume"):
            RunState(output, RUN | {"seed": 1} if change else RUN, **change)
    assert left_over(state.folder) == before


def test_a_finished_checkpoint_without_layers_is_kept(output, monkeypatch):
    """So it is behind llm-compressor's own pipeline, where no layers are kept."""
    state = RunState(output, RUN)
    finish(state)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="is finished"):
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(16, "busy")))
        state.put_in_place(replace=False)
    state.close(keep=True)
    state = RunState(output, RUN, resume=True)
    assert state.is_complete
    state.put_in_place(replace=False)
    state.close(keep=False)
    assert left_over(output.parent) == ["out"] and left_over(output) == ["new"]


def test_the_old_output_that_cannot_be_put_back_is_kept(output, monkeypatch):
    output.mkdir()
    (output / "old").touch()
    state = RunState(output, RUN)
    finish(state)
    original = Path.rename

    def rename(self, target):
        if self != output:
            raise OSError(errno.EROFS, "Read-only file system")
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(UserError, match="Read-only file system"):
            state.put_in_place(replace=True)
        state.close(keep=False)
    assert left_over(state.folder / "previous") == ["old"]
    output.mkdir()  # as scripts do before they start a command
    RunState(output, RUN, anew=True).close(keep=False)
    assert left_over(output) == ["old"]


def test_what_was_half_written_does_not_fill_the_disk(output, monkeypatch):
    state = RunState(output, RUN)
    state.save_layer({"a": torch.ones(1)}, {})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
        state.save_layer({"a": torch.ones(1)}, {})
    state.close(keep=True)
    assert left_over(state.folder) == [
        "identity.json",
        "layer-0000.safetensors",
        "lock",
        "progress.json",
    ]


def test_a_state_folder_on_another_disk_is_refused(output):
    (output.parent / ".out.run").symlink_to("/dev/shm")
    with pytest.raises(UserError, match=r"\.out\.run is on another disk"):
        RunState(output, RUN)


def test_a_folder_that_cannot_be_written_is_one_line(output, monkeypatch):
    (output.parent / ".out.run").touch()
    with pytest.raises(UserError, match=r"cannot write to .*\.out\.run: File exists"):
        RunState(output, RUN)
    (output.parent / ".out.run").unlink()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match=r"cannot write to .*\.out\.run: No space"):
        RunState(output, RUN)
