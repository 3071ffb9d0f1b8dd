"""The one exception that a command shows as one line instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: the message names the culprit and the cure in one line.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


class CalibrationError(UserError, ValueError):
    """A model, recipe or batch that calibration cannot go on with; in ``oneshot`` a ValueError."""
