"""JSON Lines files, with errors that name the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maca_serve.errors import UserError


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSON Lines file; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        columns: what each row must have.

    Raises:
        UserError: no such file, a line that is not a JSON object, or a missing column.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        yield number, _parse(path, number, line, columns)


def _parse(path: Path, number: int, line: str, columns: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is not a JSON object")
    for column in columns:
        if column not in row:
            present = ", ".join(sorted(row)) or "none"
            raise UserError(f"{path}: line {number} has no column {column!r}; it has: {present}")
    return row
