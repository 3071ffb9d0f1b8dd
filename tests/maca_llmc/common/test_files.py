"""Files are whole or not there."""

import json

import pytest

from maca_llmc.common import files


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_parent_that_cannot_hold_a_file_is_named(tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    assert files.unwritable_parent(taken / "below" / "a.json") == taken
    assert files.unwritable_parent(tmp_path / "new" / "a.json") is None
    assert files.existing_parent(tmp_path / "new" / "a.json") == tmp_path
