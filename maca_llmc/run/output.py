"""Where a checkpoint may be made: checked before anything is computed for it."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from maca_llmc.common import record
from maca_llmc.common.errors import UserError
from maca_llmc.common.files import existing_parent, is_free, unwritable_parent
from maca_llmc.run.state import state_folder


def resolve_output(output: str | Path) -> Path:
    """The folder that ``output`` stands for, behind links: a link stays, what it points to is made.

    :raises UserError: for a path that no folder can have
    """
    path = Path(output)
    try:
        resolved = path.expanduser().resolve()
        for name in (resolved, state_folder(resolved)):
            name.exists()  # raises for a name that is too long
    except OSError as error:
        raise UserError(f"output {path} cannot be made: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # a circle of links, an unknown ~user, "/"
        raise UserError(f"output {path} cannot be made: {error}") from None
    return resolved


def check_output(output: Path, inputs: Iterable[Any], overwrite: bool, resume: bool) -> None:
    """Refuse an output that could not be put in place, or would take the place of something else.

    :param output: as :func:`resolve_output` gives it
    :param inputs: of them, paths must not be in ``output``, which is replaced
    :raises UserError: says what is in the way
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: give a folder")
    _check_movable(output)
    for path in inputs:
        if isinstance(path, str | Path) and _is_in(Path(path), output):
            raise UserError(f"output {output} holds {path}, which the run reads: give another one")
    finished = resume and record.finished_identity(output) is not None
    if not is_free(output) and not finished:
        _check_replaced(output, overwrite)
    if parent := unwritable_parent(output):
        raise UserError(f"output {output} cannot be made in {parent}: give another one")


def _check_movable(output: Path) -> None:
    """Refuse a folder that no other can be renamed to."""
    if str(output) in {partition.mountpoint for partition in psutil.disk_partitions(all=True)}:
        raise UserError(
            f"output {output} is a mount point, which no finished folder can be renamed to: give "
            f"a folder in it, such as {output / 'checkpoint'}"
        )
    if _is_in(Path(), output):
        raise UserError(
            f"output {output} would be replaced, and is or holds the current folder: give another "
            f"one, such as {output / 'checkpoint'}"
        )


def _is_in(path: Path, folder: Path) -> bool:
    try:
        return path.expanduser().resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # no path at all
        return False


def _check_replaced(output: Path, overwrite: bool) -> None:
    if not (output / record.RECORD_FILE).is_file():
        # --overwrite removes all of the folder: a slip of the hand must not cost a model.
        raise UserError(
            f"output folder {output} holds what maca-llmc did not make (it has no "
            f"{record.RECORD_FILE}): give another one, or empty it yourself"
        )
    if not overwrite:
        raise UserError(f"output folder {output} is not empty: give another one or --overwrite")


def check_disk(output: Path, shapes: torch.nn.Module) -> None:
    """Refuse a disk that is too full for finished layers and the checkpoint.

    Neither is larger than the model. What a killed run has left is used again or removed.

    :raises UserError: says how much is free and how much is needed
    """
    model = sum(p.numel() * p.element_size() for p in shapes.parameters())
    left = [file for file in state_folder(output).rglob("*") if file.is_file()]
    there = sum(file.stat().st_size for file in left if "previous" not in file.parts)
    needed = max(2 * model - there, 0)
    parent = existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{parent} has {free / 1e9:.1f} GB free and the run may need {needed / 1e9:.1f} GB "
            "(finished layers and the checkpoint): free some or give another --output"
        )
