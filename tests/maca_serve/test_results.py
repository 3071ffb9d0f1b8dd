import json

import pytest
from maca_serve.errors import UserError
from maca_serve.results import check_output, write_json, write_measured, write_text


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
