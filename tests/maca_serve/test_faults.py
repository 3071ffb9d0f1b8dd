"""What goes wrong in operation: one line, nothing half-written, nobody left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from maca_serve import UserError, cli, compare, throughput, up
from maca_serve.engine import engine as engine_module
from maca_serve.engine.engine import claim_port
from packed import MODEL, write_packed
from safetensors.torch import load_file, save_file

MAIN = "from maca_serve import cli; cli.main()"
# Stands still where a function of ours would run, and says that it got there.
STALL = """
import pathlib, tempfile, time
from maca_serve import cli
from maca_serve.measuring import comparison
def stall(*_, **__):
    pathlib.Path(tempfile.gettempdir(), "reached").touch()
    time.sleep(600)
{place}
cli.main()
"""
PLANNING = STALL.format(place="comparison.plan_accuracy = stall")
# The bytes of the report are on the disk under another name, and are to be renamed.
WRITING = STALL.format(
    place="rename = pathlib.Path.replace\n"
    "pathlib.Path.replace = lambda self, to: (stall if to.suffix == '.html' else rename)(self, to)"
)


@pytest.fixture
def left_behind(tmp_path):
    """Processes of this test that still run: their temporary folder is its own or in it."""

    def belongs(process):
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        ours = environment.get("TMPDIR", "").startswith(str(tmp_path))
        return ours and process.pid != os.getpid()

    return lambda: [process for process in psutil.process_iter() if belongs(process)]


@pytest.fixture
def settings(base, quantized, text, tmp_path):
    """Of a small comparison."""
    small = {"lengths": [40], "windows": 2, "limit": 4, "concurrency": [1]}
    return {"base": base, "paths": [quantized], "text": text, "output": tmp_path / "a/out", **small}


@pytest.fixture
def command(settings):
    """The same by command."""
    options = {name: value for name, value in settings.items() if name not in ("base", "paths")}
    return ["compare", settings["base"], *settings["paths"]] + [
        word
        for name, value in options.items()
        for word in (f"--{name}", value[0] if isinstance(value, list) else value)
    ]


def start(code, arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "fault", "number"),
    [
        (PLANNING, "", signal.SIGINT),
        (MAIN, "hangs", signal.SIGINT),
        (MAIN, "stalls in scoring", signal.SIGINT),
        (MAIN, "stalls in bench", signal.SIGTERM),
        (WRITING, "", signal.SIGINT),
    ],
    ids=["planning", "starting", "scoring", "timing", "writing"],
)
def test_compare_stopped_in_each_phase(
    fake_vllm, command, left_behind, tmp_path, code, fault, number
):
    fake_vllm(fault)
    process = start(code, command)
    wait_for(tmp_path / "reached", process)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in text
    assert left_behind() == []
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "out" in path.parts]
    if code is WRITING:
        assert [path.name for path in written] == ["results.json"]
        assert len(json.loads(written[0].read_text())["checkpoints"]) == 2
    else:
        assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob("maca-serve-*"))


# What they call stands still: the doctor's own child, and the copies of memory.
NO_DOCTOR = "import maca_serve.verification.verifying as v; v._diagnose = lambda *_: []; "
DOCTOR = """
import sys
from maca_serve.doctor import asking
start = asking.start_group
child = "import os, pathlib, time; os.fork(); \\
pathlib.Path(os.environ['FAKE_VLLM_REACHED']).touch(); time.sleep(600)"
asking.start_group = lambda _, *rest, **pipes: start([sys.executable, "-c", child], *rest, **pipes)
"""
COPYING = STALL.format(
    place="from maca_serve.measuring import measure; measure.copy_bandwidth = stall"
)
OUT = ("--output", "out")
REPACKING = STALL.format(
    place="from maca_serve.formats import repacking; repacking.save_file = stall"
)


@pytest.mark.parametrize(
    ("code", "fault", "words"),
    [
        (NO_DOCTOR + MAIN, "hangs", ["verify", "w4"]),
        (NO_DOCTOR + MAIN, "stalls in scoring", ["verify", "w4"]),
        (DOCTOR + MAIN, "", ["doctor", "w4"]),
        (MAIN, "stalls in scoring", ["accuracy", "w4", "--lengths", "40", "--text", "text", *OUT]),
        (COPYING, "", ["throughput", "base", "w4", *OUT]),
        (MAIN, "stalls in bench", ["throughput", "base", "w4", "--input-len", "40", *OUT]),
        (REPACKING, "", ["repack", "w3", "out", "--container", "4"]),
    ],
    ids=["verify", "asking", "doctor", "accuracy", "copying", "throughput", "repack"],
)
def test_every_command_stopped(
    fake_vllm, base, quantized, text, left_behind, tmp_path, code, fault, words
):
    fake_vllm(fault)
    paths = {"base": base, "w4": quantized, "text": text, "out": tmp_path / "out"}
    paths["w3"] = tmp_path / "w3"
    write_packed(paths["w3"], 3)
    words = [paths.get(word, word) for word in words]
    process = start(code, words)
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert left_behind() == []
    assert not list(tmp_path.glob("maca-serve-*")) and not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stopped_while_it_starts(fake_vllm, quantized, left_behind, tmp_path, number):
    fake_vllm("hangs")
    process = start(MAIN, ["up", quantized])
    wait_for(tmp_path / "reached", process)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in text
    assert left_behind() == []
    assert not list(tmp_path.glob("maca-serve-*"))


@pytest.mark.parametrize("phase", ["scoring", "bench"])
def test_engine_killed_while_it_is_measured(fake_vllm, settings, left_behind, tmp_path, phase):
    fake_vllm(f"killed in {phase}")
    with pytest.raises(UserError, match=r"base: vLLM died while it was used: killed \(signal 9\)"):
        compare(**settings)
    assert left_behind() == []
    kept = {"scoring": [], "bench": ["results.json"]}[phase]  # the accuracy of both
    assert [file.name for file in settings["output"].glob("*")] == kept


def test_second_run_into_one_folder_is_refused(fake_vllm, settings, command, left_behind, tmp_path):
    fake_vllm("stalls in scoring")
    first = start(MAIN, command)
    wait_for(tmp_path / "reached", first)
    with pytest.raises(UserError, match=r"--output: .*/a/out is in use by another run; wait for"):
        compare(**settings)
    assert first.poll() is None
    # Killed outright, it leaves its engine and its lock file; the lock itself is gone with it.
    first.kill()
    first.communicate()
    for process in left_behind():
        process.kill()
    fake_vllm("")
    compare(**settings)
    names = sorted(path.name for path in settings["output"].iterdir())
    assert names == ["report.html", "results.json"]


class Healthy(BaseHTTPRequestHandler):
    """Another program, whose server is in good health."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def other():
    """Its port."""
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_port_taken_between_check_and_start(fake_vllm, quantized, left_behind, monkeypatch, other):
    monkeypatch.setattr(engine_module, "claim_port", lambda host, port: port or other)
    says = f"did not start: port {other} was taken meanwhile"
    for given, cure in ((None, " (log"), (other, "; choose another with --port (log")):
        with monkeypatch.context() as patch:
            patch.setattr("maca_serve.engine.launch.claim_port", lambda *_: other)
            with pytest.raises(UserError) as error:
                up(quantized, port=given).__enter__()
        assert says + cure in str(error.value)
    assert left_behind() == []


def test_another_port_is_taken_where_none_was_asked_for(
    fake_vllm, settings, left_behind, monkeypatch, other
):
    chosen = [other, other]
    monkeypatch.setattr(
        engine_module,
        "claim_port",
        lambda host, port: chosen.pop() if chosen else claim_port(host, port),
    )
    results = compare(**settings)
    assert chosen == [] and len(results["checkpoints"]) == 2
    assert left_behind() == [] and not list(settings["output"].parent.parent.glob("*.log"))


def test_up_takes_another_port_where_none_was_asked_for(
    fake_vllm, quantized, left_behind, monkeypatch, capsys, other
):
    chosen = [other]
    monkeypatch.setattr("maca_serve.engine.launch.claim_port", lambda host, port: other)
    monkeypatch.setattr(
        engine_module,
        "claim_port",
        lambda host, port: chosen.pop() if chosen else claim_port(host, port),
    )
    monkeypatch.setattr(engine_module.Engine, "wait", lambda self: None)
    assert not run_main(["up", quantized], capsys)[0]
    assert chosen == [] and left_behind() == []


def lie_in_the_index(folder, file):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = str(file)
    index.write_text(json.dumps(content))


def cut(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def other_groups(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))


def not_a_number(folder):
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    scale = min(name for name in tensors if name.endswith("weight_scale"))
    tensors[scale][1, 1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (not_a_number, r"weight_scale: holds NaN or infinity: quantize again"),
        (cut, r"model-00002-of-00002.safetensors: .*cut short: download or make it again"),
        (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "missing, and .* names it"),
        (lambda f: lie_in_the_index(f, "../x.safetensors"), "which is not a file of this folder"),
        (lambda f: lie_in_the_index(f, "/etc/passwd"), "which is not a file of this folder"),
        (
            other_groups,
            r"weight_scale is \[104, 10\], not \[104, 5\].*quantize or convert it again",
        ),
    ],
)
def test_checkpoints_that_are_not_whole(fake_vllm, base, tmp_path, spoil, says):
    fake_vllm("does not start")
    folder = tmp_path / "spoilt"
    write_packed(folder, 4, shards=2)
    spoil(folder)
    for run in (lambda: up(folder, port=None), lambda: throughput([base, folder])):
        with pytest.raises(UserError, match=says) as error:
            run()
        assert "\n" not in str(error.value)


def test_shards_may_be_links(fake_vllm, tmp_path):
    write_packed(tmp_path / "whole", 4, shards=2)
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "whole").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    with up(tmp_path / "linked", port=None) as engine:
        assert engine.checkpoint.context == MODEL["max_position_embeddings"]


def test_prompt_longer_than_the_context(fake_vllm, quantized, text, tmp_path, capsys):
    fake_vllm("does not start")
    rows = [{"question": "w1 " * 600, "choices": ["w1", "w2"], "answer": 0}] * 2
    task = tmp_path / "long.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for option, value, says in (
        ("--lengths", "40,600", "longer than the model's context 512"),
        ("--tasks", task, "long has a question of 604 tokens, longer than the model's context 512"),
    ):
        options = ["--text", text, "--windows", "2", "--lengths", "40", option, value]
        code, line = run_main(["accuracy", quantized, *options], capsys)
        assert code == 2 and says in line and line.count("\n") == 1


def test_prompt_longer_than_the_context_of_a_running_engine(fake_vllm, quantized, left_behind):
    fake_vllm("refuses")
    with (
        pytest.raises(UserError, match=r"answered 400: .*prompt too long"),
        up(quantized, port=None) as e,
    ):
        e.client().prompt_logprobs([[1] * 600])
    assert left_behind() == []


def run_main(arguments, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["maca-serve", *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code, capsys.readouterr().err


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_the_report_is_written(
    fake_vllm, base, quantized, text, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("of an earlier run")
    rename = Path.replace

    def replace(self, to):
        return full() if to.name == "report.html" else rename(self, to)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match=r"report\.html: cannot be written: No space left"):
        compare(base, [quantized], text=text, lengths=[40], windows=2, limit=4, output=out)
    assert [file.name for file in out.iterdir()] == ["results.json"]
    assert len(json.loads((out / "results.json").read_text())["checkpoints"]) == 2


def test_full_disk_where_the_log_would_be(fake_vllm, quantized, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(engine_module.tempfile, "mkstemp", full)
    code, line = run_main(["up", quantized, "--port", claim_port("127.0.0.1", None)], capsys)
    assert code == 2
    assert line == f"error: the disk of {tmp_path} or the output's is full\n"
