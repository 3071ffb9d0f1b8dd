"""What a quantize run keeps on disk, so that it survives being killed.

One hidden folder beside the output, ``.NAME.run``::

    lock             held while a run is at work
    identity.json    what the run is: model, recipe, data, device, versions
    layer-0000.safetensors ...   finished layers
    progress.json    how many of them count, their hashes, and what was measured so far
    checkpoint/      the checkpoint being written
    finished/        the checkpoint, whole, until it is renamed to the output
    previous/        the output that it replaces
    spill/           hidden states that did not fit in memory

``progress.json`` is replaced in one step after a layer's file is on disk: whatever the moment of a
kill, what it lists is whole. A resumed run loads these layers and passes the calibration tokens
through them again, which gives the hidden states it was killed with, bit for bit.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from maca_llmc.common.errors import UserError
from maca_llmc.common.files import is_free

Tensors = dict[str, torch.Tensor]

LOCK = "lock"
SCRATCH = ("checkpoint", "spill", ".*.partial")
"""What is of no use to a run that goes on."""


class RunState:
    """The state folder of one run, locked until it is closed.

    :param output: the folder the run is to make
    :param identity: what must be the same for a run to go on; JSON-able, flat
    :param resume: go on with what a killed run left
    :param anew: drop what a killed run left; has no say where ``resume`` has
    :raises UserError: when another run holds the folder, when there is a killed run's state and
        neither is set, when that run differs (the difference is named), when it is damaged
    """

    def __init__(
        self, output: Path, identity: dict[str, Any], *, resume: bool = False, anew: bool = False
    ) -> None:
        self.folder = state_folder(output)
        self.bytes = 0
        self.layers: list[str] = []
        self.content: dict[str, Any] = {}
        self._output = output
        self._previous = self.folder / "previous"
        self._finished = self.folder / "finished"
        self._lock = FileLock(self.folder / LOCK, timeout=0)
        try:
            self._take_lock()
            self._give_back()
            self._open(json.loads(json.dumps(identity)), resume, anew and not resume)
        except BaseException as error:
            self._let_go()
            if isinstance(error, OSError):
                raise UserError(
                    f"cannot write to {self.folder}: {error.strerror or error}"
                ) from error
            raise

    @property
    def finished(self) -> int:
        """How many layers are finished."""
        return len(self.layers)

    def save_layer(self, tensors: Tensors, content: dict[str, Any]) -> None:
        """Keep the next layer's tensors, and ``content``, which replaces what was kept before.

        :raises OSError: when the disk is full; what was kept before stays whole
        """
        name = f"layer-{self.finished:04d}.safetensors"
        partial = self.folder / f".{name}.partial"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        digest = _digest(partial)
        _flush(partial)
        partial.replace(self.folder / name)
        self._write("progress.json", {"layers": [*self.layers, digest], "content": content})
        self.layers.append(digest)
        self.content = content
        self.bytes += (self.folder / name).stat().st_size

    def load_layer(self, index: int) -> Tensors:
        """The tensors of a finished layer.

        :raises UserError: when its file is missing or not as it was written
        """
        path = self.folder / f"layer-{index:04d}.safetensors"
        try:
            if _digest(path) == self.layers[index]:
                return load_file(path)
        except (OSError, SafetensorError):
            pass
        raise self._damaged(path)

    def drop_layer(self, index: int) -> None:
        """Remove the file of a finished layer that no run will load again."""
        (self.folder / f"layer-{index:04d}.safetensors").unlink(missing_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint is whole and waits for its place."""
        return self._finished.is_dir()

    def complete(self, checkpoint: Path) -> None:
        """Take a whole checkpoint, written in this folder.

        :raises OSError: when the disk is full, which some file systems say only now
        """
        for file in checkpoint.rglob("*"):
            if file.is_file():
                _flush(file)
        checkpoint.rename(self._finished)

    def put_in_place(self, replace: bool) -> None:
        """Rename the finished checkpoint to the output.

        :param replace: what is there, which goes with the state
        :raises UserError: when that fails; the checkpoint and what was there stay
        """
        try:
            try:
                if not is_free(self._output):
                    if not replace:
                        raise FileExistsError(None, "it is not empty")
                    self._output.rename(self._previous)
                self._finished.rename(self._output)
            finally:
                self._give_back()
        except OSError as error:
            raise UserError(
                f"the checkpoint is finished and cannot be renamed to {self._output} "
                f"({error.strerror or error}): it is in {self._finished}; move it, or mend that "
                "and run again with --resume"
            ) from error

    def close(self, keep: bool) -> None:
        """Let go of the folder, and remove what no run needs any more.

        :param keep: finished layers and a finished checkpoint. An output that was moved out of the
            way and could not be put back is always kept.
        """
        with contextlib.suppress(OSError):  # then they stay
            self._remove(*(SCRATCH if keep and (self.layers or self.is_complete) else "*"))
        self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [LOCK] and self._lock.is_locked:
                # While it is held: who waits for this file sees that it is gone.
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        self._lock.release()

    def _take_lock(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.stat().st_dev != self.folder.parent.stat().st_dev:
            raise UserError(
                f"{self.folder} is on another disk than {self._output} will be: remove it"
            )
        try:
            self._lock.acquire()
        except (Timeout, FileNotFoundError):  # the latter where it has just removed the folder
            raise UserError(
                f"another run is writing {self._output}: wait for it or give another --output"
            ) from None

    def _give_back(self) -> None:
        """Put back the output that was moved out of the way of one that did not come."""
        if self._previous.exists() and is_free(self._output):
            self._previous.rename(self._output)

    def _remove(self, *patterns: str) -> None:
        for path in chain.from_iterable(map(self.folder.glob, patterns)):
            if path.name == LOCK or (path == self._previous and is_free(self._output)):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _open(self, identity: dict[str, Any], resume: bool, anew: bool) -> None:
        self._remove(*SCRATCH, "previous")
        if anew:
            self._remove("*.json", "finished")
        known = self._read("identity.json")
        progress = self._read("progress.json")
        if known is None or (progress is None and not self.is_complete):
            # killed before its first layer was finished
            self._remove("layer-*", "finished")
            self._write("identity.json", identity)
            return
        progress = progress or {"layers": [], "content": {}}
        if not resume:
            left = f"{len(progress['layers'])} finished layers"
            raise UserError(
                f"{self.folder} holds {'a finished checkpoint' if self.is_complete else left} of a "
                "run that did not end: go on with --resume, or start anew with --overwrite"
            )
        _check_identity(known, identity)
        self.layers, self.content = progress["layers"], progress["content"]
        self.bytes = sum(file.stat().st_size for file in self.folder.glob("layer-*.safetensors"))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise self._damaged(path) from None
        return content

    def _write(self, name: str, content: dict[str, Any]) -> None:
        partial = self.folder / f".{name}.partial"
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        _flush(partial)
        partial.replace(self.folder / name)

    def _damaged(self, path: Path) -> UserError:
        return UserError(f"{path} is damaged: start anew with --overwrite in place of --resume")


def state_folder(output: Path) -> Path:
    """Where the run that makes ``output`` keeps its state."""
    return output.with_name(f".{output.name}.run")


def layer_tensors(layer: torch.nn.Module) -> Tensors:
    """What a quantized layer consists of, without what only calibration needs.

    Copies, since QuIP's modules share their matrices, which no safetensors file can hold.
    """
    return {
        name: tensor.cpu().clone()
        for name, tensor in layer.state_dict().items()
        if "_observer." not in name
    }


def put_back(
    layer: torch.nn.Module, tensors: Tensors, put: Callable[[torch.nn.Module, str, Any], None]
) -> None:
    """Give a layer the tensors of a finished one.

    :param put: sets a parameter of a module, also of one that is offloaded
    """
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        put(layer.get_submodule(path), attribute, tensor)


def _check_identity(known: dict[str, Any], identity: dict[str, Any]) -> None:
    for key in sorted({*known, *identity}):
        before, now = known.get(key), identity.get(key)
        if before != now:
            raise UserError(
                f"cannot resume: {key} {_difference(before, now)}; run with what it was, or start "
                "anew with --overwrite in place of --resume"
            )


def _difference(before: Any, now: Any) -> str:
    """The first line in which two values differ."""
    pairs = zip_longest(str(before).splitlines(), str(now).splitlines(), fillvalue="(nothing)")
    was, is_ = next((one.strip(), other.strip()) for one, other in pairs if one != other)
    return f"was {was} and is {is_} now"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
