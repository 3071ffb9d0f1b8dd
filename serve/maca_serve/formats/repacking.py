"""Make a checkpoint in 4-bit containers of one with 2- or 3-bit weights: files and folders."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from maca_llmc.common.defaults import CONTAINER_BITS
from maca_llmc.common.files import write_json
from maca_serve.common.errors import UserError
from maca_serve.doctor.checks import check, refuse_errors
from maca_serve.doctor.headers import INDEX, Tensor, read_headers
from maca_serve.formats.checkpoint import Checkpoint, open_checkpoint
from maca_serve.formats.widening import (
    Widener,
    check_widening,
    widen_config,
    widen_record,
)

CONFIG, RECORD, CARD = "config.json", "maca_run.json", "README.md"


def repack(
    folder: str | Path, output: str | Path, *, container: int = CONTAINER_BITS
) -> dict[str, Any]:
    """Write a 2- or 3-bit weight-only checkpoint again in 4-bit containers, the same values.

    Any 4-bit kernel can then serve it, for accuracy checks: nothing is saved beyond 4 bits. Config
    groups of 4 bits and more stay as they are, every other file is copied.

    Args:
        folder: a compressed-tensors checkpoint, stored as pack-quantized.
        output: the folder to make; it appears when it is whole.
        container: bits of a container; 4.

    Returns:
        {"output": the folder, "modules": how many were widened, "size_bytes": of its weights}.

    Raises:
        UserError: another container, an output that exists, a checkpoint that has nothing to widen
            or is not whole, or a disk that is full.
    """
    if container != CONTAINER_BITS:
        raise UserError(f"--container: {container} is not supported; give {CONTAINER_BITS}")
    checkpoint, output = open_checkpoint(Path(folder)), Path(output)
    _check_output(checkpoint.path, output)
    check_widening(checkpoint.config, str(checkpoint.path))
    headers = read_headers(checkpoint.path)
    widener = _widener(checkpoint, headers)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        _write(checkpoint, headers, widener, partial)
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error)
        cure = "free some space" if full else "give an OUTPUT where you may write"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{output}: cannot be written: {reason}; {cure}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = open_checkpoint(output).size_bytes
    return {"output": str(output), "modules": widener.count, "size_bytes": size}


def _check_output(folder: Path, output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already: remove it or give another OUTPUT")
    if folder.resolve() in output.resolve().parents:
        raise UserError(f"{output}: lies inside {folder}: give an OUTPUT beside it")


def _widener(checkpoint: Checkpoint, headers: dict[str, Tensor]) -> Widener:
    """Refuses tensors that are not as the config says: they would be read as other values."""
    quantization = checkpoint.config["quantization_config"]
    contents = check(headers, quantization)
    refuse_errors(checkpoint.path, contents)
    return Widener(quantization, contents.sizes)


def _write(
    checkpoint: Checkpoint, headers: dict[str, Tensor], widener: Widener, partial: Path
) -> None:
    shards = sorted({tensor.file for tensor in headers.values()})
    ours = {CONFIG, RECORD, INDEX, *(shard.name for shard in shards)}
    for path in sorted(checkpoint.path.iterdir()):
        if path.name not in ours:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, partial / path.name)
    total = 0
    for shard in tqdm(shards, desc=f"repacking {checkpoint.name}", unit="shard"):
        total += _write_shard(shard, widener, partial / shard.name)
    write_json(partial / CONFIG, widen_config(checkpoint.config))
    if (card := partial / CARD).is_file():
        card.write_text(_noted(card.read_text(encoding="utf-8"), checkpoint.name), encoding="utf-8")
    if checkpoint.run_record:
        write_json(partial / RECORD, widen_record(checkpoint.run_record))
    index = checkpoint.path / INDEX
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {**content.get("metadata", {}), "total_size": total}
        write_json(partial / INDEX, content)


def _noted(card: str, name: str) -> str:
    """A model card that says, behind its metadata, what became of the checkpoint it is of."""
    note = (
        f"> These are the weights of `{name}` in {CONTAINER_BITS}-bit containers, the same values"
        f" bit for bit (`maca-serve repack`). What follows is the card of `{name}`.\n"
    )
    head, end, body = card.partition("\n---\n") if card.startswith("---\n") else ("", "", card)
    return f"{head}{end}\n{note}\n{body.lstrip()}"


def _write_shard(shard: Path, widener: Widener, target: Path) -> int:
    """Write one file with the same tensor names; its tensors' bytes."""
    with safe_open(shard, framework="pt") as source:
        tensors = {name: widener(name, source.get_tensor(name)) for name in source.keys()}  # noqa: SIM118
        save_file(tensors, target, metadata=source.metadata())
    shutil.copymode(shard, target)  # safetensors writes for the owner's eyes only
    return sum(tensor.nbytes for tensor in tensors.values())
