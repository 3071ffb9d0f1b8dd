"""What a machine runs out of, said in one line with what to lower."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from maca_llmc.common.errors import UserError

EXHAUSTED = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch says it: its allocator on Linux and elsewhere, and a file that it cannot map."""

EXHAUSTED_DEVICE = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""How CUDA and its libraries say it where torch's own allocator was not asked."""

LOST_DISK = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EFBIG)

OS_ERROR = re.compile(r"\(os error (\d+)\)")

ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


@contextmanager
def named_faults(folder: Path) -> Iterator[None]:
    """Turn a disk that is full or fails and exhausted memory into a ``UserError`` with a cure.

    :param folder: where the block writes
    """
    smaller = (
        "lower --batch-tokens or the longest of --lengths and start anew with --overwrite "
        "(see `maca-llmc plan`)"
    )
    try:
        with named_memory(f"lower --cache-gb and go on with --resume, or {smaller}", smaller):
            yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            what = f"no space left on the disk of {folder}: free some"
        elif _is_failed_write(error, folder):
            what = f"cannot write to {folder} ({os.strerror(_number(error) or 0)}): mend that"
        else:
            raise
        raise UserError(f"{what}, then run again with --resume") from error


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
    """Whether an error, of Python, of safetensors or of tokenizers, is that of a full disk."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def _is_failed_write(error: Exception, folder: Path) -> bool:
    """Whether a disk that went away is behind it, or something that happened to ``folder``."""
    if isinstance(error, OSError):
        names = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]
        return error.errno in LOST_DISK or any(name.is_relative_to(folder) for name in names)
    return _number(error) is not None


def _number(error: BaseException) -> int | None:
    """The operating system's number for an error; Rust's libraries say it in words only."""
    if isinstance(error, OSError):
        return error.errno
    said = OS_ERROR.search(str(error))
    return int(said[1]) if said else None


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
