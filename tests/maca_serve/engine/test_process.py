import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from maca_serve.common.errors import UserError
from maca_serve.doctor.asking import ask
from maca_serve.engine.engine import Engine
from maca_serve.engine.fit import Fit
from maca_serve.engine.process import start_group, stop_group
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.measuring.settings import SpeedSettings
from maca_serve.speed.bandwidth import copy_bandwidth
from maca_serve.speed.bench import Benchmark
from maca_serve.speed.loads import Load

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(time.sleep(1)))
print(flush=True)
time.sleep(99)
"""


@pytest.fixture(autouse=True)
def heard():
    """A shell starts what it puts in the background with Ctrl-C ignored, these tests, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_waits_until_the_stop_is_done(alive):
    process = start_group([sys.executable, "-c", DEAF], {}, stdout=subprocess.PIPE)
    process.stdout.readline()
    interrupt_after(0.3)
    with pytest.raises(KeyboardInterrupt):
        stop_group(process)
    assert not alive(process.pid)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_hears_signals(alive):
    process = start_group(["sleep", "99"], {})
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    stop_group(process)


def test_what_nobody_stopped_is_stopped_at_the_end(alive):
    code = "from maca_serve.engine.process import start_group; "
    code += "print(start_group(['sleep', '99'], {}).pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert not alive(int(done.stdout))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_started_is_stopped(alive, number):
    code = """
import subprocess, time
from maca_serve.engine.process import start_group
print(start_group(["sh", "-c", "sleep 99 & echo $!; echo $TMPDIR; wait"], {}).pid, flush=True)
time.sleep(99)
"""
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    lines = [script.stdout.readline().strip() for _ in range(3)]
    started = [int(line) for line in lines if line.isdigit()]
    (scratch,) = (Path(line) for line in lines if not line.isdigit())
    assert all(map(alive, started)) and scratch.is_dir()
    script.send_signal(number)
    script.wait(10)
    deadline = time.monotonic() + 30
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, started))
    while scratch.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not scratch.exists()


def test_without_a_guard_nothing_is_started(alive, monkeypatch):
    started = []

    def fail(process, scratch):
        started.append(process.pid)
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr("maca_serve.engine.process._guard", fail)
    with pytest.raises(BlockingIOError):
        start_group(["sleep", "99"], {})
    assert len(started) == 1 and not alive(started[0])


def test_a_forked_child_keeps_nothing_running(alive):
    code = """
import os, time
from maca_serve.engine.process import start_group
print(start_group(["sleep", "99"], {}).pid, flush=True)
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(99)
"""
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    started, forked = (int(script.stdout.readline()) for _ in range(2))
    script.kill()
    script.wait(10)
    deadline = time.monotonic() + 10
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(started) and alive(forked)
    os.kill(forked, signal.SIGKILL)


def test_programs_of_the_environment_are_found_where_it_is_not_activated(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    process = start_group(["sh", "-c", "echo $PATH"], {}, stdout=subprocess.PIPE)
    assert process.communicate()[0] == f"{Path(sys.executable).parent}:/usr/bin:/bin\n"
    stop_group(process)


def test_no_guard_stays():
    before = set(psutil.Process().children())
    stop_group(start_group(["sleep", "99"], {}))
    assert set(psutil.Process().children()) == before


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """The current folder holds modules that say that they ran; call it for whether they did."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    ran = tmp_path / "ran"
    for name in ("json", "selectors", "transformers", "torch", "vllm", "maca_serve"):
        (folder / f"{name}.py").write_text(
            f"open({str(ran)!r}, 'a').write({name!r})\nraise SystemExit(7)"
        )
    monkeypatch.chdir(folder)
    return ran.exists


def test_a_child_takes_no_code_from_the_current_folder(hostile):
    # and a grandchild neither, as when vLLM starts itself again to look at a model
    code = "import json, subprocess, sys; subprocess.run([sys.executable, '-m', 'json.tool', '-h'])"
    process = start_group([sys.executable, "-c", code], {}, stdout=subprocess.DEVNULL)
    assert process.wait() == 0
    stop_group(process)
    assert not hostile()


def test_no_child_of_ours_takes_code_from_the_current_folder(fake_vllm, quantized, hostile):
    checkpoint = open_checkpoint(quantized)
    with Benchmark(SpeedSettings()) as benchmark, Engine(checkpoint, Fit([], {})) as engine:
        benchmark.run(engine, Load(128, concurrency=1))
    with contextlib.suppress(UserError):  # the fake vLLM has no kernels
        ask({})
    with contextlib.suppress(UserError):  # without a card
        copy_bandwidth("0.32.0")
    assert not hostile()


def test_the_command_takes_no_code_from_the_current_folder(hostile, tmp_path):
    command = Path(sys.executable).parent / "maca-serve"
    done = subprocess.run([command, "doctor", "."], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert not hostile()
