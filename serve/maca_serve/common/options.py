"""Options that several commands take, and what their text stands for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from maca_serve.common.errors import UserError

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.")]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Checkpoint folders.")]
Text = Annotated[
    Path | None, typer.Option(help=".txt or .jsonl (`text`); the package's sample by default.")
]
Lengths = Annotated[
    str, typer.Option(help="Input lengths in tokens, increasing; `context` is the model's.")
]
Windows = Annotated[int, typer.Option(help="Target blocks of 32 tokens, same at every length.")]
Tasks = Annotated[
    list[str],
    typer.Option(
        help="JSONL files, `continuation`, `needle`, `copy`, lm-eval names, or `usual` for eight of"
        " them; commas, or repeat it."
    ),
]
Limit = Annotated[int, typer.Option(help="At most this many questions of each task.")]
Concurrency = Annotated[str, typer.Option(help="Requests in flight, one run for each.")]
InputLen = Annotated[str, typer.Option(help="Prompt tokens of a timed request; several: 32,512.")]
OutputLen = Annotated[int, typer.Option(help="Output tokens of a timed request.")]
Prompts = Annotated[
    int | None, typer.Option(help="Requests of a run; 2 for each in flight by default.")
]
Rates = Annotated[
    str | None,
    typer.Option(help="Also arrivals per second, e.g. 0.5,1,2; auto: shares of the base's peak."),
]
Repeats = Annotated[
    int, typer.Option(help="Runs of each checkpoint under each load, in alternating order.")
]
TensorParallel = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks of each engine.")]
Names = Annotated[
    str | None, typer.Option(help="Names in results, a,b,c; folder names by default.")
]
Output = Annotated[Path | None, typer.Option(help="JSON file for the results.")]


def join(numbers: Sequence[int | str]) -> str:
    """Numbers as a default on the command line."""
    return ",".join(map(str, numbers))


def split(value: str | None) -> list[str] | None:
    """Names with commas between."""
    return [part.strip() for part in value.split(",")] if value is not None else None


def split_tasks(values: list[str]) -> list[str]:
    """Commas separate, but a file whose name holds one is a file."""
    parts = [[value] if Path(value).is_file() else value.split(",") for value in values]
    return [part.strip() for group in parts for part in group if part.strip()]


def lengths_of(value: str) -> list[int | str]:
    """Numbers where they are some; what else may stand there is known to whoever uses them."""
    parts = [part.strip() for part in value.split(",")]
    return [int(part) if part.removeprefix("-").isdecimal() else part for part in parts]


def numbers_of(option: str, value: str) -> list[int]:
    """Whole numbers with commas between.

    Raises:
        UserError: something else.
    """
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise UserError(f"{option}: {value!r} is not a list of numbers such as 64,256") from None


def rates_of(value: str | None) -> list[float] | str:
    """Requests per second, or a word, which the settings know or refuse."""
    try:
        return [float(part) for part in value.split(",")] if value is not None else []
    except ValueError:
        return str(value)
