"""Asking the serve environment, here a script that answers as it would."""

import json
import sys

import pytest
from checkpoints import DATA

from maca_llmc.options import with_fields
from maca_llmc.planning import ask_doctor
from maca_llmc.run.prepare import prepare

ANSWER = {
    "verdict": "loads",
    "problems": [{"severity": "note", "what": "MarlinLinearKernel was slower", "cure": "measure"}],
    "changes": [{"change": "repack it", "kernels": ["MarlinLinearKernel"]}],
    "layers": [
        {
            "quantized": True,
            "count": 2,
            "kernel": "MarlinLinearKernel",
            "with_packages": {"kernel": "HummingLinearKernel", "install": ["humming-kernels"]},
        },
        {"quantized": True, "count": 1, "kernel": None, "with_packages": None},
        {"quantized": False, "count": 9, "kernel": None, "with_packages": None},
    ],
}


@pytest.fixture
def run(tiny_models):
    return prepare("nowhere", with_fields(None, {"model": str(tiny_models("llama")), **DATA}))


@pytest.fixture
def doctor(tmp_path, monkeypatch):
    def answering(code):
        script = tmp_path / "maca-serve"
        script.write_text(f"#!{sys.executable}\nimport json, sys\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(ask_doctor, "find_doctor", lambda: script)

    return answering


def test_every_target_is_asked_about_the_checkpoint_to_be(run, doctor):
    doctor(
        "shapes = json.load(open(sys.argv[sys.argv.index('--shapes') + 1]))\n"
        "assert sys.argv[1] == 'doctor' and '--json' in sys.argv\n"
        "assert shapes['layers']['model.layers.0.self_attn.k_proj'] == [32, 64]\n"
        "quantization = shapes['config']['quantization_config']\n"
        "assert quantization['format'] == 'pack-quantized', quantization\n"
        "assert quantization['quant_method'] == 'compressed-tensors'\n"
        "assert shapes['config']['model_type'] == 'llama'\n"
        "assert sys.argv[sys.argv.index('--gpu') + 1] == 'here,80,89,90,120'\n"
        f"print({json.dumps([ANSWER] * 5)!r})"
    )
    found = ask_doctor.ask_kernels(run)
    assert [entry["target"] for entry in found] == [
        "this machine",
        "compute capability 8.0 (A100)",
        "compute capability 8.9 (L40S, RTX 4090)",
        "compute capability 9.0 (H100)",
        "compute capability 12.0 (RTX 5090)",
    ]
    for entry in found:
        assert entry["verdict"] == "loads"
        assert entry["remarks"] == ["MarlinLinearKernel was slower"]
        assert entry["changes"] == ANSWER["changes"]
        assert entry["kernels"] == {
            "MarlinLinearKernel, or HummingLinearKernel with humming-kernels": 2,
            "none": 1,
        }


def test_a_doctor_that_fails_leaves_it_unknown_and_says_why(run, doctor):
    doctor("sys.exit('error: vllm is not installed here')")
    (entry,) = ask_doctor.ask_kernels(run)
    assert entry["unknown"] == "error: vllm is not installed here"


def test_no_child_takes_code_from_the_current_folder(run, doctor, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('error: ran')")
    monkeypatch.chdir(tmp_path)
    doctor(
        "import subprocess\n"
        "subprocess.run([sys.executable, '-c', 'import json'], check=True)\n"
        f"print({json.dumps([ANSWER] * 5)!r})"
    )
    assert all("unknown" not in entry for entry in ask_doctor.ask_kernels(run))


def test_without_a_serve_environment_it_is_unknown(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    (entry,) = ask_doctor.ask_kernels(run)
    assert "make setup" in entry["unknown"]


def test_the_serve_environment_beside_this_one_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    script = tmp_path / ".venv-serve" / "bin" / "maca-serve"
    script.parent.mkdir(parents=True)
    script.touch()
    assert ask_doctor.find_doctor() == script


def test_containers_are_what_is_asked_about(tiny_models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage: {b_modifiers: {MaCaModifier: {ignore: [lm_head], config_groups: {g: {targets: "
        "[Linear], weights: {num_bits: 3, strategy: group, group_size: 32}}}}}}"
    )
    source = str(tiny_models("llama"))
    run = prepare(
        "nowhere",
        with_fields(None, {"model": source, "recipe": recipe, "container": 4, **DATA}),
    )
    groups = ask_doctor.checkpoint_to_be(run)["config"]["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4]
