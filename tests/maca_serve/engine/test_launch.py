"""`up`: what the user may say, and what the machine decides."""

import socket

import cores
import pytest
from maca_serve.common.errors import EngineError, RequestError, UserError
from maca_serve.engine import launch
from maca_serve.engine.client import Client
from maca_serve.engine.engine import Engine
from maca_serve.engine.fit import Fit
from maca_serve.engine.launch import describe, up, usual_port
from maca_serve.formats.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def first_line(engine):
    return engine.log.read_text().splitlines()[0]


def ask(engine, api_key):
    return Client(engine.url, engine.checkpoint.name, api_key).prompt_logprobs([[1, 2]])


def test_a_key_is_asked_for_and_shown_to_nobody(fake_vllm, quantized):
    with up(quantized, port=None, api_key="s3cret") as engine:
        assert len(engine.client().prompt_logprobs([[1, 2]])) == 1
        for key in (None, "other"):
            with pytest.raises(RequestError, match="answered 401"):
                ask(engine, key)
        assert "s3cret" not in first_line(engine) + "".join(describe(engine))
        assert '-H "Authorization: Bearer $VLLM_API_KEY"' in describe(engine)[5]


def test_a_key_closes_every_path(fake_vllm, quantized):
    with up(quantized, port=None, api_key="s3cret") as engine:
        assert "'--middleware', 'maca_serve.engine.guard.RequireKey'" in first_line(engine)
    with up(quantized, port=None) as engine:
        assert "--middleware" not in first_line(engine)


def test_no_server_that_a_key_would_not_close(fake_vllm, quantized, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UserError, match=r"VLLM_USE_RUST_FRONTEND: .*on some paths only: unset"):
        up(quantized, port=None, api_key="s3cret")
    up(quantized, port=None)


def test_a_key_of_the_environment_holds_for_up_and_not_for_measurements(
    fake_vllm, quantized, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    assert up(quantized, port=None).api_key == "s3cret"
    assert up(quantized, port=None, api_key="other").api_key == "other"
    with Engine(open_checkpoint(quantized), Fit([], {})) as engine:
        assert ask(engine, None), "`vllm bench serve` and lm-eval would not send it"


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\n"])
def test_keys_that_are_none(fake_vllm, quantized, key):
    with pytest.raises(UserError, match="--api-key, VLLM_API_KEY: give ASCII"):
        up(quantized, port=None, api_key=key)


def test_a_free_port_where_the_usual_one_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        monkeypatch.setattr(launch, "PORT", other.getsockname()[1])
        free = usual_port("127.0.0.1")
        assert free != launch.PORT and free > 0
    assert usual_port("127.0.0.1") == launch.PORT


@cores.two_needed
def test_ranks_threads_and_flags_reach_vllm(fake_vllm, base):
    flags = ["--seed", "7"]
    engine = up(
        base, port=None, tensor_parallel=2, pipeline_parallel=1, threads=2, vllm_flags=flags
    )
    assert engine.fit.environment["VLLM_CPU_OMP_THREADS_BIND"].count("|") == 1
    with engine:
        line = first_line(engine)
    assert "'--tensor-parallel-size', '2'" in line and line.endswith("'--seed', '7']")


def test_heads_are_checked_before_cores(fake_vllm, base):
    with pytest.raises(UserError, match="--tp: 4 attention heads cannot be shared by 3"):
        up(base, port=None, tensor_parallel=3, threads=64)


def test_a_flag_that_vllm_does_not_know(fake_vllm, base):
    with pytest.raises(EngineError, match="did not start: unrecognized arguments: --no-such-flag"):
        up(base, port=None, vllm_flags=["--no-such-flag"]).__enter__()


def test_what_only_this_machine_reaches(base):
    def local(host):
        return Engine(open_checkpoint(base), Fit([], {}), host=host).local

    assert local("127.0.0.1") and local("localhost") and local("::1")
    assert not local("0.0.0.0") and not local("::") and not local("10.0.0.7")
