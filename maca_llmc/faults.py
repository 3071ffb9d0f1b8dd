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

EXHAUSTED_DEVICE = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""How CUDA and its libraries say it where torch's own allocator was not asked."""

ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


@contextmanager
def named_faults(folder: Path) -> Iterator[None]:
    """Turn a full disk and exhausted memory into a ``UserError`` that says what to lower.

    :param folder: where the block writes
    """
    smaller = (
        "lower --batch-tokens or the longest of --scales and start anew with --overwrite "
        "(see `maca-llmc plan`)"
    )
    try:
        with named_memory(f"lower --cache-gb and go on with --resume, or {smaller}", smaller):
            yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"no space left on the disk of {folder}: free some, then run again with --resume"
        ) from error


@contextmanager
def named_memory(on_host: str, on_device: str) -> Iterator[None]:
    """Turn exhausted memory into a ``UserError``.

    :param on_host: what to lower where the host's is exhausted; so ``on_device``
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where, cure = (" on the device", on_device) if _is_device(error) else ("", on_host)
        raise UserError(f"out of memory{where}{_amount(error)}: {cure}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of Python or of safetensors, is that of a full disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and "No space left" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory is exhausted."""
    if isinstance(error, MemoryError) or _is_device(error):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in EXHAUSTED)


def _is_device(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in EXHAUSTED_DEVICE)


def _amount(error: BaseException) -> str:
    found = ASKED_FOR.search(str(error)) or re.search(r"allocate (\d+ bytes)", str(error))
    return f" (asked for {found[1]} more)" if found else ""
