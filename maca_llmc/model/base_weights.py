"""What the safetensors files of a base model hold, from their headers: names, types and sizes.

Transformers casts float8 to bfloat16 without its scales, and leaves out what its model class has no
place for (draft layers), both without a word.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from maca_llmc.common.errors import UserError

NARROW_FLOAT = re.compile(r"F4|F6_|F8_")
"""Types of floating-point codes, as safetensors spells them; they need scales."""

NARROW_INTEGER = ("I8", "U8", "I32", "U32")
"""Types of packed or plain integer codes, where a weight has them."""

LEFTOVER = re.compile(
    r"(weight|_proj)_(packed|scale|scale_2|scale_inv|global_scale|zero_point|shape|blocks|scales)$"
    r"|\.(qweight|qzeros|scales|g_idx|input_scale|output_scale|SCB)$"
    r"|weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$"
)
"""What quantized checkpoints have beside or instead of a weight, by the formats' own names."""

DRAFT = re.compile(r"(^|\.)(mtp\w*|nextn\w*)\.")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
ENCODER = re.compile(r"vision|visual|audio|encoder|tower")
DRAFT_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_modules",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)
"""Where configurations say how many draft layers there are, which vLLM builds them by."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its type as safetensors spells it, and its sizes."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(source: str) -> dict[str, Tensor]:
    """Every tensor of a model's files, by name.

    :param source: a folder, or a hub name
    :return: nothing for a hub model that is not downloaded yet
    :raises UserError: when a file of the index is missing, or one is damaged
    """
    tensors: dict[str, Tensor] = {}
    for file in _open_files(source):
        for name in file.keys():  # noqa: SIM118  (the file itself is no mapping)
            part = file.get_slice(name)
            tensors[name] = Tensor(part.get_dtype(), tuple(part.get_shape()))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: the one of the usual name, and those of the index.

    :raises UserError: when there are none, or one that the index names is missing
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    single = [SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []
    if not index.is_file():
        if not single:
            raise UserError(
                f"model folder {folder} has neither {SAFE_WEIGHTS_NAME} nor {index.name}: save the "
                "model with `save_pretrained`"
            )
        return [folder / SAFE_WEIGHTS_NAME]
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({*single, *listed})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is damaged: download it or make it again") from None
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"model folder {folder} lacks {name}, which its index names: get it")
    return [folder / name for name in names]


def _open_files(source: str) -> Iterator[Any]:
    folder = folder_of(source)
    for path in [] if folder is None else weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is cut short or damaged ({error}): download it or make it again"
            ) from None


def check_unquantized(source: str, tensors: dict[str, Tensor]) -> None:
    """Refuse codes of a quantized model whose configuration does not say that it is one.

    :raises UserError: names the first such tensor
    """
    for name, tensor in tensors.items():
        codes = tensor.dtype in NARROW_INTEGER and name.endswith("weight")
        if codes or NARROW_FLOAT.match(tensor.dtype) or LEFTOVER.search(name):
            raise UserError(
                f"model {source} is quantized ({name} is {tensor.dtype}), though its config.json "
                "has no quantization_config: give the unquantized model, or dequantize this one"
            )


def check_sizes(source: str, tensors: dict[str, Tensor], shapes: torch.nn.Module) -> None:
    """Refuse tensors whose sizes are not those that the configuration asks for.

    :param shapes: the model without weights; what it names otherwise is left to loading
    :raises UserError: names the first such tensor and both sizes
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in shapes.named_parameters()}
    refuse_sizes(source, [(n, t.shape, wanted[n]) for n, t in tensors.items() if n in wanted])


def refuse_sizes(
    source: str, found: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Refuse the first of some tensors whose two sizes differ.

    :param found: name, sizes in the file, sizes by the configuration
    :raises UserError: names it, and both
    """
    unlike = sorted((name, tuple(here), tuple(asked)) for name, here, asked in found)
    for name, here, asked in unlike:
        if here != asked:
            raise UserError(
                f"model {source}: {name} is {_times(here)} and config.json asks for "
                f"{_times(asked)}: mend the sizes in config.json, or take the config.json that "
                "came with these weights"
            )


def check_finite(source: str, model: Any) -> None:
    """Refuse NaN and infinity in all that will be saved, quantized or copied.

    :raises UserError: names the first tensor that has some
    """
    for name, tensor in chain(model.state_dict().items(), _copied(source, model.config)):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # two numbers instead of a mask as large as an embedding; NaN goes through
        least, largest = torch.aminmax(tensor)
        if not (torch.isfinite(least) and torch.isfinite(largest)):
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"model {source}: {count} of {tensor.numel()} numbers in {name} are infinite or "
                f"NaN as {str(tensor.dtype).removeprefix('torch.')}: download it again, or take "
                "weights that are whole"
            )


def _copied(source: str, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for file in _open_files(source):
        for name in file.keys():  # noqa: SIM118
            if is_copied(name, config):
                yield name, file.get_tensor(name)


def is_copied(name: str, config: Any) -> bool:
    """Whether llm-compressor copies a tensor that transformers does not load (Qwen3.5's draft)."""
    text = config.get_text_config()
    promised = any(getattr(text, key, 0) for key in ("num_mtp_layers", "mtp_num_hidden_layers"))
    return promised and name.startswith("mtp")


def draft_layers(tensors: Iterable[str], config: Any) -> dict[str, int]:
    """Where a base has draft layers (multi-token prediction) that are lost, and how many tensors.

    :return: such as ``{"mtp": 15}``
    """
    names = list(tensors)
    lost = [name for name in draft_tensors(names, config) if not is_copied(name, config)]
    return branches(lost, set(names).difference(lost))


def draft_tensors(tensors: Iterable[str], config: Any) -> list[str]:
    """Names of the tensors that belong to draft layers (multi-token prediction).

    They are called so, or are of layers beyond the text model's last.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is None or getattr(config, "is_encoder_decoder", False):
        return []
    return [
        name
        for name in tensors
        if DRAFT.search(name)
        or (not ENCODER.search(name) and any(int(n) >= layers for n in LAYER.findall(name)))
    ]


def dropped(source: str, written: Path, config: Any) -> dict[str, int]:
    """What a checkpoint lacks of its base: where it was, and how many tensors there.

    A tensor counts as there when its module has something written: codes and scales for a weight,
    single experts for all of them in one.
    """
    base, there = read_headers(source), read_headers(str(written))
    modules = above(there)
    # the output head is written as the embedding that it is
    tied = any(getattr(c, "tie_word_embeddings", False) for c in (config, config.get_text_config()))
    lost = [
        name
        for name in base
        if name.rpartition(".")[0] not in modules
        and not name.endswith("inv_freq")  # computed
        and not (tied and name.endswith("lm_head.weight"))
    ]
    return branches(lost, there)


def branches(names: Iterable[str], kept: Iterable[str]) -> dict[str, int]:
    """Say in few names where some tensors are, and how many there.

    :param kept: other tensors; nothing of them is in a branch
    """
    used = above(kept)
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        branch = next((prefix for prefix in prefixes if prefix not in used), name)
        counts[branch] = counts.get(branch, 0) + 1
    return counts


def above(names: Iterable[str]) -> set[str]:
    """Every module that has one of these tensors in it."""
    return {name[:index] for name in names for index, letter in enumerate(name) if letter == "."}


def forget_draft_layers(config: dict[str, Any]) -> None:
    """Have a configuration, as in ``config.json``, say that there are no draft layers."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in DRAFT_COUNTS:
            if part.get(key):
                part[key] = 0


def folder_of(source: str) -> Path | None:
    """Where a model's files are; None for a hub model of which nothing is downloaded yet."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
