import json
import subprocess
import sys

import pytest
from maca_serve import doctor
from maca_serve.cli import app
from typer.testing import CliRunner

DIAGNOSIS = {
    "subject": "dir",
    "scheme": "W3A16",
    "vllm": "0.32.0",
    "target": {"name": "a card", "tensor_parallel": 1, "dtype": "bfloat16"},
    "problems": [{"severity": "error", "what": "w :cat:", "cure": "", "count": 0, "modules": []}],
    "layers": [],
    "changes": [],
}
MAIN = [sys.executable, "-c", "from maca_serve.cli import main; main()", "doctor"]


@pytest.fixture
def answered(monkeypatch):
    """What is asked, answered with the verdict that is set for each card."""
    calls = {"verdicts": ["loads"]}

    def diagnose_cards(subject, gpus, **options):
        calls.update(subject=subject, gpus=gpus, options=options)
        return [{**DIAGNOSIS, "verdict": verdict} for verdict in calls["verdicts"]]

    monkeypatch.setattr(doctor, "diagnose_cards", diagnose_cards)
    monkeypatch.setattr(doctor, "read_folder", lambda folder: str(folder))
    monkeypatch.setattr(doctor, "read_shapes", lambda _: "shapes")
    return calls


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize(
    ("verdict", "code"), [("loads", 0), ("conditional", 0), ("unknown", 0), ("does not load", 1)]
)
def test_exit_codes(answered, verdict, code):
    answered["verdicts"] = [verdict]
    assert run("dir").exit_code == code


def test_options_arrive(answered):
    run("dir", "--gpu", "9.0", "--tp", "4")
    assert answered["gpus"] == ["9.0"] and answered["options"] == {"tensor_parallel": 4}
    assert answered["subject"] == "dir"
    run("dir")
    assert answered["gpus"] == [None]
    run("--shapes", "file.json")
    assert answered["subject"] == "shapes"


def test_json_is_all_of_stdout(answered):
    found = json.loads(run("dir", "--json").stdout)
    assert found == {**DIAGNOSIS, "verdict": "loads"}


def test_several_cards(answered):
    answered["verdicts"] = ["loads", "does not load"]
    done = run("dir", "--gpu", "80, here")
    assert answered["gpus"] == ["80", None]
    assert done.exit_code == 1 and done.stdout.count("dir: W3A16") == 2
    found = json.loads(run("dir", "--gpu", "80,here", "--json").stdout)
    assert [one["verdict"] for one in found] == answered["verdicts"]


def test_text(answered):
    said = run("dir").stdout
    assert "dir: W3A16" in said
    assert "ERROR: w" in said


@pytest.mark.parametrize("arguments", [[], ["dir", "--shapes", "file.json"]])
def test_one_subject(arguments):
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: give a checkpoint folder DIR or a file --shapes, one of them\n"


def test_bad_input_is_one_line(tmp_path):
    done = subprocess.run([*MAIN, str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/no: no such folder (")
    assert done.stderr.count("\n") == 1
