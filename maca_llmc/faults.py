"""What a machine runs out of, said in one line with what to lower."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from maca_llmc.errors import UserError

EXHAUSTED = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch says it: its allocator on Linux and elsewhere, and a file that it cannot map."""

ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


@contextmanager
def named_faults(folder: Path) -> Iterator[None]:
    """Turn a full disk and exhausted memory into a ``UserError`` that says what to lower.

    :param folder: where the block writes
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        if is_disk_full(error):
            raise UserError(
                f"no space left on the disk of {folder}: free some, then run again with --resume"
            ) from error
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory{_where(error)}{_amount(error)}: lower --cache-gb and go on with "
                "--resume, or lower --batch-tokens or the longest of --scales and start anew with "
                "--overwrite (see `maca-llmc plan`)"
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of Python or of safetensors, is that of a full disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and "No space left" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in EXHAUSTED)


def _where(error: BaseException) -> str:
    return " on the device" if isinstance(error, torch.OutOfMemoryError) else ""


def _amount(error: BaseException) -> str:
    found = ASKED_FOR.search(str(error)) or re.search(r"allocate (\d+ bytes)", str(error))
    return f" (asked for {found[1]} more)" if found else ""
