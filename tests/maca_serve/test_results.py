import pytest
from maca_serve.errors import UserError
from maca_serve.results import check_output, write_json, write_text


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
