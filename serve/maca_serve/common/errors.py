"""Errors that a user can act on, and how errors are told."""

import traceback
from pathlib import Path
from typing import Any

try:
    from maca_llmc.common.errors import UserError
except ModuleNotFoundError as error:
    raise ImportError(
        "maca-serve takes modules of maca-llmc: pip install --no-deps maca-llmc (a checkout's root)"
    ) from error


class RequestError(UserError):
    """The running engine refused a request, or did not answer it.

    Attributes:
        answered: whether it answered as one in good health does; if not, it may be dying.
    """

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


class BrokenAnswerError(RequestError):
    """The engine answered, and a log-probability of its answer is no number."""


class EngineError(UserError):
    """vLLM failed to start, or died.

    Attributes:
        details: the last lines of vLLM's log, shown before the message.
    """

    def __init__(self, message: str, details: list[str]) -> None:
        super().__init__(message)
        self.details = details


class IncompleteError(EngineError):
    """Some checkpoints could not be measured; what was measured is there.

    Attributes:
        results: as those of a whole measurement, with `failed` besides.
    """

    def __init__(self, message: str, details: list[str], results: dict[str, Any]) -> None:
        super().__init__(message, details)
        self.results = results

    def kept_in(self, path: Path) -> "IncompleteError":
        """The same, saying where its results are."""
        said = f"{self}; what was measured is in {path}"
        return IncompleteError(said, self.details, self.results)


class PortTakenError(EngineError):
    """vLLM found its port taken, which was free when it was checked."""


def one_line(error: Exception) -> str:
    """An exception as vLLM's log would show it, in one line; without a message, its code."""
    said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
    return " ".join(f"{type(error).__name__}: {said}".split())
