"""Result files: checked before the work, written whole or not at all."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from maca_llmc.common import files
from maca_serve.common.errors import UserError


def check_output(path: str | Path | None, *, folder: bool = False) -> None:
    """Check that an output can be written, before hours are spent on its content.

    Args:
        path: a file, or a folder; None for no output.
        folder: whether it is a folder.

    Raises:
        UserError: the other kind is there already, or its place cannot be written to.
    """
    if path is None:
        return
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"--output: {path} is a {'file' if folder else 'folder'}")
    place = path.absolute() if folder else path.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {place}: {error.strerror}") from error


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder; what was made for the lock and is empty goes again.

    Args:
        folder: made where it is missing.

    Raises:
        UserError: another run has it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    file = folder / ".lock"
    lock = FileLock(file, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        own = _identity(file)
    # Not there, or in the way for a moment: a run that ends has just removed it.
    except (Timeout, FileNotFoundError, FileExistsError):
        lock.release()
        raise UserError(
            f"--output: {folder} is in use by another run; wait for it or give another folder"
        ) from None
    try:
        yield
    finally:
        # While it is held: whoever opened it before sees then that it is gone. Another's stays,
        # where the folder was removed and made again meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if _identity(file) == own:
                file.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON beside, then rename; NaN and infinity are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def write_measured(path: Path, value: dict[str, Any]) -> None:
    """Write what took hours to measure; where that fails, into the temporary folder.

    Raises:
        UserError: it could not be written there, and where it was kept.
    """
    try:
        write_json(path, value)
    except UserError as error:
        try:
            kept = Path(tempfile.gettempdir()) / f"maca-serve-results-{uuid4().hex}.json"
            write_json(kept, value)
        except (OSError, UserError):  # nor is there room, or any temporary folder
            raise error from None
        raise UserError(f"{error}; what was measured is kept as {kept}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file beside, then rename, so that no reader and no interrupt sees half of it.

    Raises:
        UserError: the disk is full, or the folder went away.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
