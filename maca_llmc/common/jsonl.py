"""Text, JSON and JSON Lines files, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maca_llmc.common.errors import UserError


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    :raises UserError: a file that cannot be read, or in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start} (line {line}): convert it to UTF-8"
        ) from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line of a JSON Lines file is and what stands there; blank ones are left out.

    :raises UserError: as :func:`read_text`.
    """
    return cut_lines(read_text(path), str(path))


def cut_lines(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of ``text`` as :func:`read_lines` does, for a file called ``name``."""
    # Not splitlines(): it also cuts at U+2028, U+0085 and others, which may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{name} line {number}", line


def parse(text: str, where: str) -> Any:
    """Return the value that ``text`` is the JSON of.

    :raises UserError: when it is not JSON, naming ``where`` it stands.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg} at column {error.colno}): mend or remove it"
        ) from error
    except (ValueError, RecursionError) as error:  # an endless number, brackets without end
        raise UserError(f"{where} cannot be read as JSON ({error}): mend or remove it") from error


def parse_rows(text: str, name: str) -> list[tuple[str, Any]]:
    """Return the rows of a ``.json`` file, each with where it is.

    A list of rows, one row, or JSON Lines, which are often called ``.json``.

    :raises UserError: when it is not JSON.
    """
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        lines = list(cut_lines(text, name))
        if len(lines) < 2 or not lines[0][1].rstrip().endswith("}"):
            parse(text, name)  # raises: one value that is broken
        return [(where, parse(line, where)) for where, line in lines]
    if not isinstance(whole, list):
        return [(name, whole)]
    return [(f"{name} row {number}", row) for number, row in enumerate(whole, start=1)]
