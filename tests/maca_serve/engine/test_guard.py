"""The key before every path; against the real vLLM in test_real_engine.py."""

import asyncio
from importlib.util import find_spec

import pytest
from maca_serve.engine.guard import RequireKey

RIGHT = [(b"authorization", b"Bearer s3cret")]


@pytest.fixture
def answer(monkeypatch):
    """What the first message of an answer is: the application's own is its scope."""
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")

    async def app(scope, receive, send):
        await send(scope)

    async def receive():
        return {}

    def ask(path, headers=(), **scope):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, **scope}
        asyncio.run(RequireKey(app)(scope, receive, send))
        return sent[0]

    return ask


PATHS = ["/v1/completions", "/invocations", "/tokenize", "/metrics", "/docs", "/", "//health"]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_answers_without_the_key(answer, path):
    for headers in ([], [(b"authorization", b"Bearer other")], [(b"authorization", b"s3cret")]):
        assert answer(path, headers)["status"] == 401
    assert answer(path, RIGHT)["path"] == path
    assert answer(path, [(b"authorization", b"bearer  s3cret")])["path"] == path


def test_sockets_are_closed(answer):
    assert answer("/v1/realtime", type="websocket") == {"type": "websocket.close", "code": 1008}
    assert answer("/v1/realtime", RIGHT, type="websocket")["path"] == "/v1/realtime"


def test_what_stays_open(answer):
    assert answer("/health")["path"] == "/health"
    assert answer("/x/health", root_path="/x")["path"] == "/x/health"
    assert answer("/v1/completions", method="OPTIONS")["method"] == "OPTIONS"
    assert answer("", type="lifespan")["type"] == "lifespan"


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_takes_it_as_a_middleware(monkeypatch):
    from argparse import Namespace

    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    app = FastAPI()
    for path in ("/invocations", "/v1/completions", "/health"):
        app.get(path)(lambda: "answered")
    lists = {name: ["*"] for name in ("allowed_origins", "allowed_methods", "allowed_headers")}
    options = {"allow_credentials": False, "api_key": None, "enable_request_id_headers": False}
    guard = f"{RequireKey.__module__}.{RequireKey.__name__}"
    init_entrypoints_middleware(Namespace(**lists, **options, middleware=[guard]), app, ())
    client, key = TestClient(app), {"Authorization": "Bearer s3cret"}
    for path in ("/invocations", "/v1/completions"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=key).json() == "answered"
    assert client.get("/health").json() == "answered"
