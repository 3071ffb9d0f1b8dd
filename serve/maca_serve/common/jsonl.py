"""Text and JSON Lines files, with errors that name the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: no such file, one that cannot be read, or another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8"
        ) from error


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSON Lines file; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        columns: what each row must have.

    Raises:
        UserError: no such file, a line that is not a JSON object, or a missing column.
    """
    # Not splitlines(): it also cuts at U+2028, U+0085 and others, which may stand inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, _parse(path, number, line, columns)


def _parse(path: Path, number: int, line: str, columns: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # an endless number, brackets without end
        raise UserError(f"{path}: line {number} cannot be read as JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is not a JSON object")
    for column in columns:
        if column not in row:
            present = ", ".join(sorted(row)) or "none"
            raise UserError(f"{path}: line {number} has no column {column!r}; it has: {present}")
    _check_characters(path, number, [row[column] for column in columns])
    return row


def _check_characters(path: Path, number: int, values: list[Any]) -> None:
    """Refuse halves of characters such as "\\ud83d", which no tokenizer takes."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{path}: line {number} holds {half}, half of a character (a lone surrogate):"
            " replace it"
        ) from error
