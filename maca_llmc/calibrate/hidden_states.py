"""Hidden states between two layers, in memory up to a limit and in files beyond it."""

import math
from pathlib import Path

import torch


def waiting_place(device: torch.device, size: int) -> torch.device:
    """Where hidden states wait for the next layer: on a GPU while they leave it room, or the host.

    :param device: computed on
    :param size: of all of them, in bytes
    """
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return device if size <= free // 4 else torch.device("cpu")


class HiddenStates:
    """Tensors by key: one per batch, or several where more than one stream goes through.

    :param limit: bytes to hold in memory; None for all
    :param folder: where the rest goes, made when it is needed
    :ivar device: where those in memory are; the host's, unless told
    """

    device = torch.device("cpu")

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit = math.inf if limit is None else limit
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._spilled: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._bytes = 0

    @property
    def spilled_bytes(self) -> int:
        """How much is in files, in bytes."""
        return sum(dtype.itemsize * shape.numel() for dtype, shape in self._spilled.values())

    def put(self, key: str, hidden: torch.Tensor) -> None:
        """Keep the hidden states of a batch in place of those it had.

        :raises OSError: when the disk is full
        """
        hidden = hidden.to(self.device)
        before = self._held.pop(key, None)
        self._bytes += hidden.nbytes - (0 if before is None else before.nbytes)
        if self._folder is None or self._bytes <= self._limit:
            self._spilled.pop(key, None)
            self._held[key] = hidden
            return
        self._bytes -= hidden.nbytes
        self._folder.mkdir(parents=True, exist_ok=True)
        content = hidden.cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._path(key).write_bytes(content.data)
        self._spilled[key] = hidden.dtype, hidden.shape

    def get(self, key: str) -> torch.Tensor:
        """The hidden states of a batch; from a file, on the CPU."""
        if key in self._held:
            return self._held[key]
        dtype, shape = self._spilled[key]
        content = bytearray(self._path(key).read_bytes())
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def _path(self, key: str) -> Path:
        assert self._folder is not None  # nothing is spilled without one
        return self._folder / f"hidden-{key}.bin"
