"""A function called in a copy of this process, so that what it changes here is not changed."""

import multiprocessing
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_a_fork(function: Callable[[], Any]) -> Any:
    """Call it in a fork of this process, which keeps all that is imported.

    Args:
        function: gives what can be pickled, and computes with one thread: those of this process
            are not in its copy.

    Raises:
        ChildProcessError: it raised, or its process died; its traceback is on standard error.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        child.join()
        raise ChildProcessError(f"a fork ended with exit code {child.exitcode}") from None
    child.join()
    return found
