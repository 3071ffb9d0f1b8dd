"""Where the command line writes, and how progress looks."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as _Remaining

# Results go to stdout, progress and errors to stderr, so that results can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A progress display with time spent and time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        _Remaining(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=err,
    )
