"""Child processes in a process group of their own, stopped without leaving any behind."""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERM_SECONDS = 20.0
KILL_SECONDS = 10.0
# Outlives us if we are killed, and then stops the group; a line on its input says that it was
# stopped. Either way it removes what the group left among temporary files, as vLLM does.
GUARD = """
if ! read -r _; then
    kill -s TERM "$1"
    for _ in $(seq "$2"); do kill -s 0 "$1" || break; sleep 1; done
    kill -s KILL -- "-$1"
fi
rm -rf -- "$3"
"""
# For every Python among our children and theirs: the current folder, which may be a downloaded
# repository, is not where they look for modules.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
# Those that run, and their guards: an interrupt may come between a start and the `with` that would
# stop it.
_running: dict[subprocess.Popen[str], subprocess.Popen[str]] = {}


def start_group(
    command: list[str], environment: dict[str, str], **streams: int | IO[Any]
) -> subprocess.Popen[str]:
    """Start a command as leader of its own session, so that all it starts can be stopped with it.

    It is stopped as well when this process ends without a chance to do so, as by SIGKILL. Its
    temporary files have a folder of their own, which is removed with it. A Python takes no modules
    from the current folder.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        streams: stdin, stdout, stderr as for `subprocess.Popen`.
    """
    with _signals_deferred():
        scratch = tempfile.mkdtemp(prefix="maca-serve-")
        process = None
        try:
            process = subprocess.Popen(
                command,
                # vLLM looks for programs that its environment brings (ninja, nvcc) in the PATH
                env={**os.environ, **SAFE_PATH, "PATH": _path(), "TMPDIR": scratch, **environment},
                start_new_session=True,
                text=True,
                **streams,  # type: ignore[call-overload]
            )
            _running[process] = _guard(process, scratch)
        except BaseException:
            if process is not None:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return process


def _path() -> str:
    """The PATH as in this Python's environment, whether that is activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def stop_group(process: subprocess.Popen[str]) -> None:
    """Ask the leader to stop, then kill what is left of its group; return when none is left.

    Ctrl-C does not cut this short, for that is how orphans come to be; it takes effect afterwards.
    """
    with _signals_deferred():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
        deadline = time.monotonic() + KILL_SECONDS
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        if guard := _running.pop(process, None):
            guard.communicate("stopped\n")


def listens(process: subprocess.Popen[str], port: int) -> bool:
    """Whether the process, or one that it started, listens on a TCP port."""
    try:
        leader = psutil.Process(process.pid)
        family = [leader, *leader.children(recursive=True)]
        sockets = [socket for member in family for socket in member.net_connections("tcp")]
    except psutil.Error:  # one of them ended meanwhile
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)


def _disown() -> None:
    """In a forked child, which must not keep the guards' inputs open, nor stop what is not its."""
    for guard in _running.values():
        if guard.stdin:
            guard.stdin.close()
    _running.clear()


os.register_at_fork(after_in_child=_disown)


@atexit.register
def _stop_all() -> None:
    for process in list(_running):
        stop_group(process)


def _guard(process: subprocess.Popen[str], scratch: str) -> subprocess.Popen[str]:
    """Wait, in a session of its own, for the end of this process, which closes its input."""
    return subprocess.Popen(
        ["sh", "-c", GUARD, "guard", str(process.pid), str(int(TERM_SECONDS)), scratch],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False when no process of it is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Hold back the signals that stop us until the block is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # A handler and not SIG_IGN, which a child that is started here would inherit.
    held = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in STOP_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
