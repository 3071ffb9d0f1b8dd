import errno

import pytest
import torch
from safetensors import SafetensorError

from maca_llmc.common.errors import UserError
from maca_llmc.common.resource_errors import named_faults

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # of tokenizers
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk(tmp_path, error):
    with (
        pytest.raises(UserError, match=f"no space left on the disk of {tmp_path}"),
        named_faults(tmp_path),
    ):
        raise error


def test_host_memory_says_how_much_was_asked_for(tmp_path):
    with (
        pytest.raises(UserError, match=r"asked for \d+ bytes more\): lower --cache-gb"),
        named_faults(tmp_path),
    ):
        torch.empty(10**15)


def test_device_memory_says_how_much_was_asked_for(tmp_path):
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 80 GiB"
    with (
        pytest.raises(UserError, match=r"on the device \(asked for 2\.50 GiB more\)"),
        named_faults(tmp_path),
    ):
        raise torch.OutOfMemoryError(said)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
    ],
)
def test_device_memory_that_a_library_of_cuda_asked_for(tmp_path, error):
    match = "^out of memory on the device: lower --batch-tokens"  # --cache-gb is of the host's
    with pytest.raises(UserError, match=match), named_faults(tmp_path):
        raise error


def test_weights_that_cannot_be_mapped_are_a_lack_of_memory(tmp_path):
    said = "unable to mmap 269060552 bytes from file <a/model.safetensors>: Cannot allocate memory"
    with pytest.raises(UserError, match="out of memory"), named_faults(tmp_path):
        raise RuntimeError(said)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), RuntimeError("shape mismatch")])
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error), match=str(error.args[-1])), named_faults(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("I/O error: Stale file handle (os error 116)"),
        "gone",
    ],
    ids=str,
)
def test_a_disk_that_fails_and_a_folder_that_goes_away(tmp_path, error):
    with (
        pytest.raises(UserError, match=rf"^cannot write to {tmp_path} \(\w.*\): .*--resume$"),
        named_faults(tmp_path),
    ):
        if error == "gone":
            (tmp_path / "removed" / "file").touch()
        raise error


def test_what_is_one_line_already_stays(tmp_path):
    with pytest.raises(UserError, match=r"^cannot load model"), named_faults(tmp_path):
        raise UserError("cannot load model base: No such file or directory (os error 2)")
