"""Where the command line writes, and how progress looks."""

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as _Remaining
from rich.table import Column
from rich.text import Text

# Results go to stdout, progress and errors to stderr, so that results can be piped.
# Where they are no terminal nothing is cut.
WIDE = 200
out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False)


class _Note(ProgressColumn):
    """What is being done: the first to give way on a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["note"]), style="dim", overflow="ellipsis", no_wrap=True)


def progress() -> Progress:
    """A progress display with time spent and time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        _Remaining(table_column=Column(no_wrap=True)),
        _Note(),
        console=err,
    )
