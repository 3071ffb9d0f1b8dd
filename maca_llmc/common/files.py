"""Files that are whole or not there, and where they may be made."""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, then rename, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def existing_parent(output: Path) -> Path:
    """The folder on whose disk ``output`` will be."""
    return next(folder for folder in output.absolute().parents if folder.exists())


def unwritable_parent(output: Path) -> Path | None:
    """What keeps ``output`` from being made: a file or a read-only folder above it, or None."""
    parent = existing_parent(output)
    return None if parent.is_dir() and os.access(parent, os.W_OK) else parent


def is_free(output: Path) -> bool:
    """Whether a folder can be renamed to ``output`` and nothing is lost: none there, or empty."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))
