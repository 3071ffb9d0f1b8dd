"""What both command lines have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import typer


def version_option(versions: Callable[[], Mapping[str, str | None]]) -> Any:
    """Make the option ``--version``.

    :param versions: by package, None for what is not installed; asked only where they are wanted
    """

    def show(wanted: bool) -> None:
        if wanted:
            for name, number in versions().items():
                typer.echo(f"{name} {number or '(not installed)'}")
            raise typer.Exit

    return typer.Option(
        "--version",
        callback=show,
        is_eager=True,
        help="Versions of this and of what decides its results.",
    )
