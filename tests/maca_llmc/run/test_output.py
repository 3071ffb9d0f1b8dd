"""Where a checkpoint may be made."""

import shutil

import pytest
import torch

from maca_llmc.common.errors import UserError
from maca_llmc.common.record import RECORD_FILE
from maca_llmc.run.output import check_disk, check_output, resolve_output


def check(output, *inputs, overwrite=False, resume=False):
    check_output(resolve_output(output), inputs or ("org/model", None), overwrite, resume)


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        check(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_point_is_refused_and_a_folder_in_it_named(overwrite):
    refused(
        "output /dev/shm is a mount point, .* such as /dev/shm/", "/dev/shm", overwrite=overwrite
    )
    check("/dev/shm/checkpoint-of-a-test")


def test_a_link_to_a_mount_point_is_one(tmp_path):
    (tmp_path / "link").symlink_to("/dev/shm")
    refused("output /dev/shm is a mount point", tmp_path / "link")


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    refused("is or holds the current folder", ".")
    refused("is or holds the current folder", "..")
    check("new")


def test_what_holds_the_model_or_data_is_refused_also_to_overwrite(tmp_path):
    (tmp_path / "out" / "base").mkdir(parents=True)
    (tmp_path / "out" / RECORD_FILE).touch()
    for path in (tmp_path / "out", tmp_path / "out" / "base", f"{tmp_path}/out/data.jsonl"):
        match = f"holds {path}, which the run reads"
        refused(match, tmp_path / "out", "org/model", path, overwrite=True)
    check(tmp_path / "out" / "base" / "new", tmp_path / "out" / "base")


@pytest.mark.parametrize("output", ["/", "a" * 254, "~no-such-user/out", "loop"])
def test_a_path_that_no_folder_can_have_is_refused(tmp_path, monkeypatch, output):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    refused("cannot be made: .", output)


def test_the_disk_is_that_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("/dev/shm/out-of-a-test")
    asked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(str(path)) or usage)
    check_disk(resolve_output(tmp_path / "link"), torch.nn.Linear(1, 1))
    assert asked == ["/dev/shm"]


def test_what_a_killed_run_left_is_not_asked_for_again(tmp_path, monkeypatch):
    model = torch.nn.Linear(1000, 10, bias=False)
    left = tmp_path / ".out.run"
    (left / "checkpoint").mkdir(parents=True)
    (left / "layer-0000.safetensors").write_bytes(bytes(30_000))
    (left / "checkpoint" / "model.safetensors").write_bytes(bytes(30_000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    check_disk(tmp_path / "out", model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=19_999))
    with pytest.raises(UserError, match="may need"):
        check_disk(tmp_path / "out", model)
