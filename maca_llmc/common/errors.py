"""The exception that a command shows as one line instead of a traceback, and such lines."""


class UserError(Exception):
    """Something the user can mend: the message names the culprit and the cure in one line.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


class CalibrationError(UserError, ValueError):
    """A model, recipe or batch that calibration cannot go on with; in ``oneshot`` a ValueError."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and the next where that only announces it.

    Its type where it says nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
