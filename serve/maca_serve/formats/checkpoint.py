"""What a checkpoint folder says about itself, without loading weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.formats.schemes import describe_scheme

WEIGHTS = ("*.safetensors", "*.bin")
# Of the language model's config: what quantizing leaves as it was.
KEPT_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights.

    Attributes:
        path: the folder.
        name: what results call it.
        config: its config.json.
    """

    path: Path
    name: str
    config: dict[str, Any]

    @property
    def quantized(self) -> bool:
        """Whether its config says how it was quantized."""
        return bool(self.config.get("quantization_config"))

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config (multimodal models nest it)."""
        return self.config.get("text_config") or self.config

    @property
    def context(self) -> int | None:
        """The model's context in tokens, None when its config does not say."""
        return self.text_config.get("max_position_embeddings")

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of its weight files on disk."""
        return sum(file.stat().st_size for glob in WEIGHTS for file in self.path.glob(glob))

    @cached_property
    def run_record(self) -> dict[str, Any]:
        """`maca_run.json`, how it was quantized; empty for checkpoints made by others."""
        return _read_optional(self.path / "maca_run.json")

    @cached_property
    def diagonals(self) -> dict[str, Any]:
        """`maca_diagonals.json`, Hessian diagonals per input length; empty when not there."""
        return _read_optional(self.path / "maca_diagonals.json")

    @property
    def scheme(self) -> str:
        """How its weights are stored, and what they are where a wider container holds them."""
        stored = describe_scheme(self.config)
        bits, scheme = self.run_record.get("container_bits"), self.run_record.get("scheme")
        if bits and scheme:
            # The quantize side's records say so themselves.
            return scheme if "container" in scheme else f"{scheme} in {bits}-bit containers"
        return stored


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Open a checkpoint folder.

    Args:
        path: the folder.
        name: what results call it; the folder's name when None.

    Raises:
        UserError: no folder, no readable config.json, or no weights in it.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder (a model of the hub: `hf download NAME --local-dir DIR` first)"
        )
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(f"{path}: not a checkpoint folder: it has no config.json")
    config = _read_json(config_path)
    if not any(file.is_file() for glob in WEIGHTS for file in path.glob(glob)):
        raise UserError(f"{path}: not a checkpoint folder: it has no *.safetensors weights")
    return Checkpoint(path, name or path.resolve().name, config)


def require_quantized(checkpoint: Checkpoint) -> None:
    """Raise UserError for a folder that is not a quantized checkpoint."""
    if not checkpoint.quantized:
        raise UserError(
            f"{checkpoint.path}: not a quantized checkpoint (its config.json has no"
            " quantization_config); give the unquantized model first, as BASE"
        )


def require_same_model(base: Checkpoint, checkpoint: Checkpoint, option: str) -> None:
    """Refuse a base that the checkpoint cannot have been quantized from.

    Args:
        base: the unquantized model.
        checkpoint: the quantized one.
        option: what the user gave the base as.

    Raises:
        UserError: both configs name one of KEPT_KEYS, and differ in it.
    """
    for key in KEPT_KEYS:
        found, wanted = (each.text_config.get(key) for each in (base, checkpoint))
        if None not in (found, wanted) and found != wanted:
            raise UserError(
                f"{option}: {base.path} has {key} {found} and {checkpoint.path} {wanted};"
                " give the model that was quantized"
            )


def tell_apart(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[str]:
    """What results call several folders.

    Args:
        paths: the folders; they need not be there.
        names: one per folder; the folders' names when None.

    Raises:
        UserError: names that do not match the folders, or two alike.
    """
    if names is not None and len(names) != len(paths):
        raise UserError(f"--names: {len(names)} names for {len(paths)} checkpoint folders")
    chosen = [path.resolve().name for path in paths] if names is None else list(names)
    seen: dict[str, Path] = {}
    for name, path in zip(chosen, paths, strict=True):
        if name in seen:
            raise UserError(
                f"{seen[name]} and {path} are both named {name!r};"
                " tell them apart with --names a,b,..."
            )
        seen[name] = path
    return chosen


def open_all(paths: list[Path], names: Sequence[str] | None = None) -> list[Checkpoint]:
    """Open several folders under names that tell them apart.

    Args:
        paths: the folders.
        names: one per folder; the folders' names when None.

    Raises:
        UserError: as `open_checkpoint`, names that do not match the folders, or two alike.
    """
    if not paths:
        raise UserError("give at least one checkpoint folder")
    return [open_checkpoint(*each) for each in zip(paths, tell_apart(paths, names), strict=True)]


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
