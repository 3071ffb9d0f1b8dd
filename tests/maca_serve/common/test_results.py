import json
import shutil
import subprocess
import sys

import filelock
import pytest
from maca_serve.common.errors import UserError
from maca_serve.common.results import (
    check_output,
    lock_folder,
    write_json,
    write_measured,
    write_text,
)


def test_written_whole_in_folders_made_for_it(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert path.read_text() == '{\n  "x": 2\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "b.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert '"x": 1' in path.read_text()


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UserError, match=r"b\.txt: cannot be written: No space left on device"):
        write_text(tmp_path / "b.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_is_kept_where_the_output_went_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "out").write_text("a file by now")
    with pytest.raises(UserError, match=r"cannot be written: .*; what was measured is") as error:
        write_measured(tmp_path / "out" / "r.json", {"x": 1})
    (kept,) = tmp_path.glob("maca-serve-results-*.json")
    assert json.loads(kept.read_text()) == {"x": 1} and str(error.value).endswith(str(kept))


def test_a_disk_without_room_for_either_leaves_nothing(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UserError, match=r"r\.json: cannot be written: No space left on device$"):
        write_measured(tmp_path / "r.json", {"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_no_temporary_folder_either(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file by now")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"r\.json: cannot be written: [A-Z][a-z ]*$"):
        write_measured(tmp_path / "out" / "r.json", {"x": 1})


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", folder=True)
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="file: Not a directory"):
        check_output(tmp_path / "file" / "below" / "x.json")
    check_output(tmp_path / "new" / "x.json")
    check_output(tmp_path, folder=True)
    check_output(None)


def test_one_run_to_a_folder(tmp_path):
    folder = tmp_path / "a" / "out"
    with lock_folder(folder):
        with pytest.raises(UserError, match="out is in use by another run"), lock_folder(folder):
            pass
        assert (folder / ".lock").is_file(), "the one that is refused removes nothing"
    assert list(tmp_path.iterdir()) == [], "what was made for the lock"
    with lock_folder(folder):
        (folder / "results.json").touch()
    assert [file.name for file in folder.iterdir()] == ["results.json"]


def test_a_lock_of_another_run_stays(tmp_path):
    folder = tmp_path / "out"
    with lock_folder(folder):
        shutil.rmtree(folder)
        other = lock_folder(folder)
        other.__enter__()
    with pytest.raises(UserError, match="in use by another run"), lock_folder(folder):
        pass
    other.__exit__(None, None, None)


def test_a_folder_that_goes_away_is_one_line(tmp_path, monkeypatch):
    def gone(lock):
        raise FileNotFoundError(lock.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", gone)
    with pytest.raises(UserError, match="in use by another run"), lock_folder(tmp_path / "out"):
        pass


WORKER = """
import os, sys, time
from pathlib import Path
from maca_serve.common.errors import UserError
from maca_serve.common.results import lock_folder
folder, end, held = Path(sys.argv[1]) / "out", time.monotonic() + 3, 0
while time.monotonic() < end:
    try:
        with lock_folder(folder):
            os.close(os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL))
            os.unlink(sys.argv[1] + "/inside")
            held += 1
    except UserError:
        pass
print(held)
"""


def test_no_two_runs_hold_one_folder(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    held = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sum(map(int, held)) > 100
