import os
import signal
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests
from maca_serve.common.errors import BrokenAnswerError, EngineError, RequestError, UserError
from maca_serve.engine import engine as module
from maca_serve.engine.client import Client, direct_to
from maca_serve.engine.engine import Engine, claim_port
from maca_serve.engine.fit import Fit
from maca_serve.engine.launch import describe, up
from maca_serve.formats.checkpoint import open_checkpoint

NO_SETTINGS = Fit([], {})


def worker_of(engine: Engine) -> int:
    lines = engine.log.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("worker")).split()[1])


@pytest.fixture
def engine(fake_vllm, quantized) -> Engine:
    return Engine(open_checkpoint(quantized), NO_SETTINGS)


def test_it_answers_says_its_kernel_and_leaves_nothing(engine, alive):
    with engine:
        worker = worker_of(engine)
        log = engine.log
        assert alive(worker)
        assert engine.kernel == "CPUWNA16LinearKernel"
        assert engine.start_seconds > 0
        assert len(engine.client().prompt_logprobs([[1, 2, 3], [4, 5]])) == 2
    assert not alive(worker)
    assert not log.exists()
    with pytest.raises(RequestError, match="did not answer"):
        engine.client().prompt_logprobs([[1, 2]])


def test_proxies_of_the_environment_are_not_asked(engine, proxy):
    with engine:
        assert len(engine.client().prompt_logprobs([[1, 2, 3]])) == 1
        url = f"{engine.url}/v1/models"
        with direct_to(url):
            assert requests.get(url).status_code == 200
            assert os.environ["no_proxy"] == "example.org,127.0.0.1"
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org"
        assert "curl --noproxy '*' http://127" in "".join(describe(engine))


def test_it_stops_when_the_user_of_it_fails(engine, alive):
    with pytest.raises(ZeroDivisionError), engine:
        worker = worker_of(engine)
        1 / 0  # noqa: B018
    assert not alive(worker)


def test_settings_reach_vllm(fake_vllm, quantized):
    settings = Fit(["--max-model-len", "77"], {"FAKE_VLLM": "refuses"})
    with Engine(open_checkpoint(quantized, "name"), settings) as engine:
        first = engine.log.read_text().splitlines()[0]
        with pytest.raises(RequestError, match=r"answered 400.*prompt too long"):
            engine.client().prompt_logprobs([[1, 2]])
    assert "'--max-model-len', '77'" in first
    assert "'--served-model-name', 'name'" in first
    assert "'--host', '127.0.0.1'" in first


@pytest.mark.parametrize(("level", "used"), [("WARNING", "INFO"), ("DEBUG", "DEBUG")])
def test_what_is_read_from_the_log_is_in_it_and_plain(engine, monkeypatch, level, used):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with engine:
        leader = psutil.Process(worker_of(engine)).parent()
        assert leader.environ()["VLLM_LOGGING_LEVEL"] == used
        assert leader.environ()["VLLM_LOGGING_COLOR"] == "0", "goes before FORCE_COLOR"


def test_what_vllm_leaves_among_temporary_files_is_removed(engine):
    with engine:
        leader = psutil.Process(worker_of(engine)).parent()
        scratch = Path(leader.environ()["TMPDIR"])
        assert scratch.is_dir() and scratch.parent == Path(tempfile.gettempdir())
        (scratch / "socket").touch()
    assert not scratch.exists()


def test_failing_start_names_the_cause_and_shows_the_log(fake_vllm, engine, quantized):
    fake_vllm("does not start")
    with pytest.raises(EngineError, match="w4: vLLM did not start: ValueError: no kernel") as error:
        engine.__enter__()
    assert "\n" not in str(error.value)
    assert any("Engine core initialization failed" in line for line in error.value.details)
    assert f"(maca-serve doctor {quantized} says what to change; log: {engine.log})" in str(
        error.value
    )


def test_silent_start_is_given_up(fake_vllm, engine, monkeypatch, alive):
    fake_vllm("hangs")
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(module, "_healthy", lambda url: False)
    with pytest.raises(EngineError, match="said nothing for"):
        engine.__enter__()
    assert not alive(worker_of(engine))


def test_asking_for_health_resets_no_connection():
    """Servers log a reset as an error, which then reads as the cause of a later death."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as asking:
        port = server.getsockname()[1]
        healthy = asking.submit(module._healthy, f"http://127.0.0.1:{port}")
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            # more than a client reads at once when it only wants the status
            body = bytes(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert healthy.result()
            assert connection.recv(4096) == b""


def test_death_in_use_is_reported_with_its_cause(fake_vllm, engine, alive):
    fake_vllm("dies")
    with pytest.raises(EngineError, match="died while it was used: MemoryError: no room"), engine:
        worker = worker_of(engine)
        engine.client().prompt_logprobs([[1, 2]])
    assert not alive(worker)


def test_killed_leader_leaves_no_worker(engine, alive):
    with pytest.raises(EngineError, match=r"died while it was used: killed \(signal 9\)"), engine:
        worker = worker_of(engine)
        engine._process.kill()
        engine.wait()
    assert not alive(worker)


def test_interrupted_start_leaves_nothing(fake_vllm, engine):
    fake_vllm("hangs")

    def interrupt(number, frame):
        raise KeyboardInterrupt

    with ExitStack() as stack:
        old = signal.signal(signal.SIGALRM, interrupt)
        stack.callback(signal.signal, signal.SIGALRM, old)
        signal.setitimer(signal.ITIMER_REAL, 3.0)
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0.0)
        with pytest.raises(KeyboardInterrupt):
            engine.__enter__()
    assert engine._process.returncode is not None
    assert not engine.log.exists()


def test_taken_port_is_named(fake_vllm, quantized):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}.*--port"):
            up(quantized, port=port)


def test_a_port_that_is_none():
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1 port 70000: .* \(--port\)"):
        claim_port("127.0.0.1", 70000)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "300.1.1.1", "192.0.2.1"])
@pytest.mark.parametrize("port", [8000, None])
def test_hosts_that_are_none(host, port):
    with pytest.raises(UserError, match=f"cannot listen on {host}: .*choose another with --host"):
        claim_port(host, port)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:81"), ("0.0.0.0", "http://127.0.0.1:81"), ("::", "http://[::1]:81")],
)  # fmt: skip
def test_url(base, host, url):
    assert Engine(open_checkpoint(base), NO_SETTINGS, host=host, port=81).url == url


def test_base_has_no_low_bit_kernel(fake_vllm, base, monkeypatch):
    monkeypatch.setattr(module, "find_kernels", lambda lines: [])
    with Engine(open_checkpoint(base), NO_SETTINGS) as engine:
        assert engine.kernel == "none (BF16)"
        monkeypatch.setattr(module, "find_dtype", lambda lines: "float32")
        assert engine.kernel == "none (FP32)"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("minus infinity", r"log-probability -9999.0: the weights.*broken"),
        ("nan", r"log-probabilities are no numbers \(NaN\): the weights.*broken"),
    ],
)
def test_broken_weights_are_said_to_be(fake_vllm, engine, fault, says):
    fake_vllm(fault)
    with pytest.raises(BrokenAnswerError, match=says), engine:
        engine.client().prompt_logprobs([[1, 2]])


def test_no_server_at_all():
    began = time.monotonic()
    with pytest.raises(RequestError, match="did not answer"):
        Client("http://127.0.0.1:9", "m").prompt_logprobs([[1, 2]])
    assert time.monotonic() - began < 5


def test_fake_is_what_these_tests_ran(engine):
    with engine:
        command = Path(f"/proc/{engine._process.pid}/environ").read_bytes()
    assert b"tests/maca_serve/fake" in command
