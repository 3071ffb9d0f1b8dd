"""Quantize and tune in one go: the same tensors as one after the other, and nothing left over."""

import json

import pytest
from checkpoints import tensors
from tiny import WIDE, random_text, save_tiny_model

import maca_llmc
from maca_llmc.common.errors import UserError
from maca_llmc.common.record import RECORD_FILE
from maca_llmc.tuning import after_quantizing

GIVEN = {"data": random_text(documents=40, length=80), "lengths": [16, 32], "tokens": 512}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), **WIDE)


@pytest.mark.parametrize("effort", ["light", "full"])
def test_the_result_is_that_of_both_commands(model, tmp_path, effort):
    whole = maca_llmc.quantize(
        tmp_path / "whole", model=str(model), scheme="w3a16", tune=effort, **GIVEN
    )
    start = maca_llmc.quantize(tmp_path / "start", model=str(model), scheme="w3a16", **GIVEN)
    tuned = maca_llmc.tune(
        start, tmp_path / "tuned", base=str(model), end_to_end=effort == "full", **GIVEN
    )
    found, expected = tensors(whole), tensors(tuned)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in found)
    record = json.loads((whole / RECORD_FILE).read_text())
    assert record["tuning"]["blocks"] and bool(record["tuning"]["end_to_end"]) == (effort == "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start", "tuned", "whole"]


def test_a_run_killed_between_both_goes_on(model, tmp_path, monkeypatch):
    given = {"model": str(model), "tune": "light", **GIVEN}
    with monkeypatch.context() as patched:
        patched.setattr(after_quantizing, "tune", lambda *_, **__: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception):
            maca_llmc.quantize(tmp_path / "out", **given)
    calls = []
    monkeypatch.setattr(
        after_quantizing.quantize_run, "_calibrate", lambda *_: calls.append("calibrated")
    )
    maca_llmc.quantize(tmp_path / "out", **given, resume=True)
    assert not calls and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tune": "hard"}, "--tune hard: give light or full"),
        ({"tune": "light", "tune_tokens": 0}, "--tune-tokens 0: give a number"),
        ({"tune_tokens": 64}, "--tune-tokens 64: give --tune light or full with it"),
        ({"tune": "light", "scheme": "FP8_DYNAMIC"}, "--tune takes integers by group or channel"),
        ({"scheme": "W3"}, "--scheme W3: give one of W4A16_ASYM, "),
        ({"scheme": "W4A16", "recipe": "r.yaml"}, "--recipe r.yaml and --scheme W4A16: give one"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(model, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        maca_llmc.quantize(tmp_path / "out", model=str(model), **GIVEN | given)
    assert not list(tmp_path.iterdir())
