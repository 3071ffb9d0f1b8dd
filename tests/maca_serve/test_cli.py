import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from maca_serve.cli import app
from maca_serve.common import machine
from maca_serve.common.errors import UserError
from maca_serve.engine.fit import cpu_dtype
from typer.testing import CliRunner

MAIN = [sys.executable, "-c", "from maca_serve.cli import main; main()"]


def call(*arguments, timeout=120):
    return subprocess.run(
        [*MAIN, *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )


def start_up(folder, port):
    process = subprocess.Popen(
        [*MAIN, "up", str(folder), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("Ctrl-C"):
            break
    return process, lines


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_up_until_a_signal(fake_vllm, quantized, number, code, alive):
    process, lines = start_up(quantized, 18431)
    assert lines[0] == "w4: W4A16 int, group 64, symmetric"
    assert lines[1] == "kernel: CPUWNA16LinearKernel"
    assert lines[2].startswith(f"fit:    512 tokens, KV cache 1 GiB, {cpu_dtype()}, cores ")
    assert lines[3] == "url:    http://127.0.0.1:18431/v1"
    assert lines[5].startswith("try:    curl http://127.0.0.1:18431/v1/completions -H")
    log = Path(lines[4].split()[1]).read_text()
    worker = int(re.search(r"worker (\d+)", log)[1])
    assert alive(worker)
    process.send_signal(number)
    assert process.wait(30) == code
    assert not alive(worker)


def test_up_ends_with_the_engine(fake_vllm, quantized):
    process, _lines = start_up(quantized, 18432)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    assert process.wait(30) == 2
    assert "error: " in process.stderr.read()


def test_error_is_one_line_on_stderr_with_code_2(tmp_path):
    done = call("accuracy", tmp_path / "nope")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/nope: no such folder (")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_engine_log_stands_before_the_error(fake_vllm, quantized):
    fake_vllm("does not start")
    done = call("up", quantized, "--port", "18433")
    assert done.returncode == 2
    lines = done.stderr.rstrip().splitlines()
    assert "no kernel for 3 bits" in done.stderr
    assert lines[-1].startswith("error: ")
    assert "vLLM did not start: ValueError: no kernel for 3 bits (maca-serve doctor " in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["up"], "DIR"),
        (["up", "x", "--trust-remote-code"], "--trust-remote-code"),
        (["compare", "base"], "DIR"),
        (["accuracy", "x", "--windows", "many"], "--windows"),
        (["fly"], "fly"),
    ],
)
def test_usage_errors_are_one_line_too(arguments, culprit):
    done = call(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and culprit in line
    command = "" if culprit == "fly" else f" {arguments[0]}"
    assert line.endswith(f"(see maca-serve{command} --help)")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "64,x"], "--lengths: 'x' is neither a number nor `context`"),
        (["--lengths", ""], "--lengths: '' is neither a number"),
        (["--lengths", "64,context"], "the text has 1 spans of 512 tokens, 2 windows"),
        (["--lengths", "64", "--tasks", "a/b"], "a/b: no such file"),
    ],
)
def test_lists_that_are_none(fake_vllm, quantized, text, arguments, says):
    done = call("accuracy", quantized, "--text", text, "--windows", 2, *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_names_that_collide_are_told_at_once(quantized, monkeypatch):
    # Nothing of this can be imported.
    monkeypatch.setitem(sys.modules, "maca_serve.measuring.comparison", None)
    done = CliRunner().invoke(app, ["compare", str(quantized), str(quantized)])
    assert isinstance(done.exception, UserError)
    assert "are both named 'w4'; tell them apart with --names" in str(done.exception)


def test_accuracy_prints_a_table(fake_vllm, quantized, text, tmp_path):
    options = ["--text", text, "--lengths", "40,64", "--windows", "2", "--limit", "4"]
    done = call("accuracy", quantized, *options, "--output", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    assert "perplexity at length" in done.stdout
    assert "continuation" in done.stdout
    assert (tmp_path / "a.json").is_file()


def test_what_was_measured_is_shown_before_the_error(fake_vllm, base, quantized, text, tmp_path):
    fake_vllm("does not start for w4")
    options = ["--text", text, "--lengths", "40,64", "--windows", "2", "--limit", "4"]
    done = call("accuracy", base, quantized, *options, "--output", tmp_path / "a.json")
    assert done.returncode == 2
    assert re.search(r"base +\d+\.\d+ ± ", done.stdout)
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith(f"error: {quantized}: vLLM did not start: ValueError: no kernel for 3")
    assert last.endswith(f"what was measured is in {tmp_path}/a.json")


def test_throughput_takes_lengths_and_rates(fake_vllm, base, quantized, tmp_path):
    options = ["--input-len", "32,64", "--rates", "0.5", "--repeats", "1", "--concurrency", "1"]
    done = call("throughput", base, quantized, *options, "--output", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert re.search(r"w4 +64 tokens in +nowhere", done.stdout)
    assert re.search(r"w4 +64 +0.5 +2.00", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 100
    settings = json.loads((tmp_path / "s.json").read_text())["settings"]["speed"]
    assert (settings["input_len"], settings["rates"]) == ([32, 64], [0.5])


def test_rates_that_are_none(fake_vllm, quantized):
    done = call("throughput", quantized, "--rates", "fast")
    assert done.returncode == 2
    assert "error: --rates: 'fast' is not auto" in done.stderr


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys; from maca_serve import cli;"
        "print({'torch', 'transformers', 'matplotlib', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
    began = time.monotonic()
    assert call("--help").returncode == 0
    assert time.monotonic() - began < 10


def test_version_names_what_takes_part_in_a_measurement():
    done = call("--version")
    assert done.returncode == 0 and done.stderr == ""
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    versions = machine.versions().items()
    assert told == {name: number or "(not installed)" for name, number in versions}


def test_missing_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*requirements/serve-cpu.txt"):
        machine.require_vllm()


def test_missing_stub_says_what_to_install(fake_vllm, monkeypatch):
    def version(name):
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", version)
    with pytest.raises(UserError, match="vllm-cpu-stub"):
        machine.require_vllm()
