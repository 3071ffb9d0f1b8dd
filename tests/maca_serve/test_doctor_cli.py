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
    """Calls of `diagnose` and `diagnose_shapes`, answered with the verdict that is set."""
    calls = {"verdict": "loads"}

    def diagnose(subject, **options):
        calls["subject"], calls["options"] = str(subject), options
        return {**DIAGNOSIS, "verdict": calls["verdict"]}

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    monkeypatch.setattr(doctor, "diagnose_shapes", lambda *a, **k: diagnose("shapes", **k))
    return calls


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize(
    ("verdict", "code"), [("loads", 0), ("conditional", 0), ("unknown", 0), ("does not load", 1)]
)
def test_exit_codes(answered, verdict, code):
    answered["verdict"] = verdict
    assert run("dir").exit_code == code


def test_options_arrive(answered):
    run("dir", "--gpu", "9.0", "--tp", "4")
    assert answered["options"] == {"gpu": "9.0", "tensor_parallel": 4}
    assert answered["subject"] == "dir"
    run("--shapes", "file.json")
    assert answered["subject"] == "shapes"


def test_json_is_all_of_stdout(answered):
    found = json.loads(run("dir", "--json").stdout)
    assert found == {**DIAGNOSIS, "verdict": "loads"}


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
