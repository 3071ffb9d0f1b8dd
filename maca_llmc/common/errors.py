"""The exception that a command shows as one line instead of a traceback, and such lines."""


class UserError(Exception):
    """Something the user can mend: the message names the culprit and the cure in one line.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


class CalibrationError(UserError, ValueError):
    """A model, recipe or batch that calibration cannot go on with; in ``oneshot`` a ValueError."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
