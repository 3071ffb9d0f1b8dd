"""Child processes in a process group of their own, stopped without leaving any behind."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERM_SECONDS = 20.0
KILL_SECONDS = 10.0


def start_group(
    command: list[str], environment: dict[str, str], **streams: int | IO[Any]
) -> subprocess.Popen[str]:
    """Start a command as leader of its own session, so that all it starts can be stopped with it.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        streams: stdin, stdout, stderr as for `subprocess.Popen`.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        text=True,
        **streams,  # type: ignore[call-overload]
    )


def stop_group(process: subprocess.Popen[str]) -> None:
    """Ask the leader to stop, then kill what is left of its group; return when none is left.

    A second Ctrl-C does not cut this short: that is how orphans come to be.
    """
    with _signals_held():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + KILL_SECONDS
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.05)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False when no process of it is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
