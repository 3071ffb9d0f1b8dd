"""One running `vllm serve`: start, wait until it answers, stop without orphans."""

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from maca_serve.common.console import progress
from maca_serve.common.errors import EngineError, PortTakenError, RequestError, UserError
from maca_serve.engine.client import Client
from maca_serve.engine.enginelog import (
    find_cause,
    find_dtype,
    find_experts,
    find_kernels,
    last_message,
    tail,
)
from maca_serve.engine.fit import Fit
from maca_serve.engine.guard import KEY_VARIABLE, RequireKey
from maca_serve.engine.process import listens, start_group, stop_group
from maca_serve.formats.checkpoint import Checkpoint
from maca_serve.formats.schemes import describe_dtype, shorten_dtype

LOG_TAIL = 15
NO_START = "did not start"
# A start is given up when the engine has logged nothing for this long.
SILENT_SECONDS = 600.0
POLL_SECONDS = 0.5
# A dying engine fails its requests a little before its process ends.
DEATH_SECONDS = 5.0
# Other programs may take a port between its choice and the engine's start, half a minute later.
PORT_TRIES = 3
# What a start takes on two cores; only the first bar's estimate hangs on it.
EXPECTED_SECONDS = 60.0


class Engine:
    """`vllm serve` for one checkpoint, as a context manager.

    Entering starts it and returns when it answers. Leaving stops it and every process it started;
    its log is kept only when it failed. An error of a request is reported as the engine's death
    when the engine died.

    Attributes:
        checkpoint: what it serves, under `checkpoint.name`.
        start_seconds: how long the start took.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        fit: Fit,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        api_key: str | None = None,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            checkpoint: what to serve.
            fit: settings, see `maca_serve.engine.fit`.
            host: address to listen on.
            port: TCP port; a free one when None, and another where that is taken meanwhile.
            api_key: what clients must show on every path but `/health`; nothing when None,
                whatever the environment says.
        """
        self.checkpoint = checkpoint
        self.fit = fit
        self.host = host
        self.port = port
        # Whether another will do where that is taken between its check and vLLM's start.
        self.any_port = port is None
        self.api_key = api_key
        self.start_seconds = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._log: Path | None = None

    @property
    def url(self) -> str:
        """Where it can be reached from this machine, without `/v1`."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{local}]:{self.port}" if ":" in local else f"http://{local}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def log(self) -> Path:
        """The file with everything vLLM printed."""
        assert self._log is not None, "the engine was not started"
        return self._log

    @property
    def kernel(self) -> str:
        """The low-bit kernels that vLLM chose, as its log names them."""
        kernels = find_kernels(self.log_lines) + find_experts(self.log_lines)
        if kernels:
            return ", ".join(kernels)
        if self.checkpoint.quantized:
            return "not named in vLLM's log"
        computed = shorten_dtype(self.dtype) if self.dtype else None
        return f"none ({computed or describe_dtype(self.checkpoint.config)})"

    @property
    def dtype(self) -> str | None:
        """What it computes in (`bfloat16`), None where its log does not say."""
        return find_dtype(self.log_lines)

    @property
    def log_lines(self) -> list[str]:
        """What vLLM printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def client(self) -> Client:
        """A client for its completions."""
        return Client(self.url, self.checkpoint.name, self.api_key)

    def __enter__(self) -> Self:
        """Start and wait.

        Raises:
            UserError: the port is taken.
            EngineError: it did not start, with the last lines of its log.
        """
        for _ in range(PORT_TRIES - 1):
            try:
                return self._enter()
            except PortTakenError:
                if not self.any_port:
                    raise
                self.log.unlink()
                self.port = None
        return self._enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop; a failed request of a dead engine becomes an EngineError."""
        unanswered = isinstance(error, RequestError) and not error.answered
        died = unanswered and self._dies_within(DEATH_SECONDS)
        failure = self._failure("died while it was used") if died else None
        self._stop(keep_log=died)
        if failure is not None:
            raise failure from error

    def check(self) -> None:
        """Raise EngineError when the engine has died."""
        if self._exit_code() is not None:
            raise self._failure("died while it was used")

    def wait(self) -> None:
        """Return never; raises EngineError when the engine dies."""
        while True:
            self.check()
            time.sleep(POLL_SECONDS)

    def _enter(self) -> Self:
        self.port = claim_port(self.host, self.port)
        try:
            self._start()
            self._wait()
        except BaseException as error:
            self._stop(keep_log=isinstance(error, EngineError))
            raise
        return self

    def _start(self) -> None:
        handle, name = tempfile.mkstemp(prefix="maca-serve-", suffix=".log")
        self._log = Path(name)
        # By the environment: a command line can be read by everybody on the machine.
        environment = {KEY_VARIABLE: self.api_key or "", **_logging()}
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
        command += [str(self.checkpoint.path), "--served-model-name", self.checkpoint.name]
        command += ["--host", self.host, "--port", str(self.port), "--disable-uvicorn-access-log"]
        command += ["--middleware", f"{RequireKey.__module__}.RequireKey"] if self.api_key else []
        command += self.fit.arguments
        with os.fdopen(handle, "w") as log:
            self._process = start_group(
                command,
                {**self.fit.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait(self) -> None:
        began = changed = time.monotonic()
        size = 0
        with progress() as bar:
            task = bar.add_task(
                f"starting {self.checkpoint.name}", total=EXPECTED_SECONDS, note="vLLM"
            )
            while not self._ready():
                if self._exit_code() is not None:
                    raise self._failure(NO_START)
                now = time.monotonic()
                if self.log.stat().st_size != size:
                    size, changed = self.log.stat().st_size, now
                if now - changed > SILENT_SECONDS:
                    raise self._failure(f"said nothing for {SILENT_SECONDS:.0f} s while starting")
                # The bar stays short of full: nobody knows how long a large model takes.
                done = min(now - began, 0.98 * EXPECTED_SECONDS)
                bar.update(task, completed=done, note=last_message(self.log_lines))
                time.sleep(POLL_SECONDS)
            bar.update(task, completed=EXPECTED_SECONDS, note="ready")
        self.start_seconds = time.monotonic() - began

    def _ready(self) -> bool:
        """Whether it answers; another program that took the port meanwhile may answer as well."""
        assert self._process is not None and self.port is not None
        return _healthy(self.url) and listens(self._process, self.port)

    def _exit_code(self) -> int | None:
        assert self._process is not None, "the engine was not started"
        return self._process.poll()

    def _dies_within(self, seconds: float) -> bool:
        """Whether its process ends soon: vLLM answers with an error before it gives up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._exit_code() is not None:
                return True
            time.sleep(0.1)
        return False

    def _failure(self, what: str) -> EngineError:
        lines = self.log_lines
        code, cause = self._exit_code(), find_cause(lines)
        kind = EngineError
        if code == -signal.SIGKILL:
            cause = "killed (signal 9), as Linux does when memory runs out"
        elif cause and "Address already in use" in cause:
            kind = PortTakenError
            cure = "" if self.any_port else "; choose another with --port"
            cause = f"port {self.port} was taken meanwhile{cure}"
        elif not cause:
            cause = f"exit code {code}" if code is not None else "no error named"
        # Its reasons, if any, are lines of their own, and in the log.
        cause = cause.removesuffix(" Reasons:")
        logged = f"log: {self.log}"
        if what == NO_START and kind is EngineError and self.checkpoint.quantized:
            logged = f"maca-serve doctor {self.checkpoint.path} says what to change; {logged}"
        return kind(
            f"{self.checkpoint.path}: vLLM {what}: {cause} ({logged})", tail(lines, LOG_TAIL)
        )

    def _stop(self, *, keep_log: bool) -> None:
        try:
            if self._process is not None:
                stop_group(self._process)
        finally:
            if not keep_log and self._log is not None:
                self._log.unlink(missing_ok=True)


def _logging() -> dict[str, str]:
    """What is read from the log must be in it, plain, whatever the user's environment says."""
    level = "DEBUG" if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG" else "INFO"
    return {"VLLM_LOGGING_LEVEL": level, "VLLM_LOGGING_COLOR": "0"}


def _healthy(url: str) -> bool:
    # Not httpx: interrupted at the wrong moment, its connection pool keeps its lock, and closing it
    # then waits forever.
    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "", where.port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        # Closing with an unread body resets the connection, and servers log that as an error.
        answer.read()
        return answer.status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def claim_port(host: str, port: int | None) -> int:
    """Check that a port can be listened on; choose a free one when None.

    Raises:
        UserError: taken, not allowed, or no such host.
    """
    if port is not None and not 0 < port < 65536:
        raise UserError(f"cannot listen on {host} port {port}: ports are 1 to 65535 (--port)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As vLLM does: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        no_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        where, option = (host, "--host") if no_host else (f"{host} port {port}", "--port")
        raise UserError(
            f"cannot listen on {where}: {error.strerror or error}; choose another with {option}"
        ) from error
