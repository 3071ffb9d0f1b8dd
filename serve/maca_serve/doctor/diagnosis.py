"""The doctor's answer: what a checkpoint is, what vLLM would run it with, and what to change."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.doctor import findings
from maca_serve.doctor.asking import ask
from maca_serve.doctor.checks import (
    Contents,
    check,
    check_sizes,
    check_values,
    planned_tensors,
)
from maca_serve.doctor.headers import read_headers
from maca_serve.doctor.loadable import describe_tensors
from maca_serve.doctor.variants import variants
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.formats.schemes import describe_scheme

Diagnosis = dict[str, Any]
# Of CUDA cards from Maxwell to Blackwell; newer ones are not known to the vLLM that is pinned.
MAJORS = range(5, 13)
_CAPABILITY = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)a?", re.IGNORECASE)
# Compute capability by card, from https://developer.nvidia.com/cuda-gpus.
CARDS = {
    **dict.fromkeys(("v100",), 70),
    **dict.fromkeys(("t4", "2080", "2080ti"), 75),
    **dict.fromkeys(("a100", "a30"), 80),
    **dict.fromkeys(("a10", "a10g", "a40", "a6000", "3080", "3090"), 86),
    **dict.fromkeys(("l4", "l40", "l40s", "4080", "4090", "6000ada"), 89),
    **dict.fromkeys(("h20", "h100", "h200", "gh200"), 90),
    **dict.fromkeys(("b200", "gb200"), 100),
    **dict.fromkeys(("b300", "gb300"), 103),
    **dict.fromkeys(("5070", "5080", "5090", "pro6000"), 120),
    **dict.fromkeys(("gb10", "dgxspark"), 121),
}
_BRANDS = re.compile(r"nvidia|geforce|tesla|rtx|[\s_-]", re.IGNORECASE)


@dataclass(frozen=True)
class Subject:
    """What is examined: a checkpoint's config and what is known of its tensors.

    Attributes:
        name: what the user called it.
        config: its config.json.
        contents: what its headers say.
        scheme: in words.
        tensors: (safetensors' name of the type, shape) by name.
        whole: whether these are all that it has.
    """

    name: str
    config: dict[str, Any]
    contents: Contents
    scheme: str
    tensors: dict[str, tuple[str, list[int]]]
    whole: bool


def diagnose(folder: str | Path, *, gpu: str | None = None, tensor_parallel: int = 1) -> Diagnosis:
    """Examine a checkpoint folder without loading weights.

    Args:
        folder: the checkpoint.
        gpu: card or compute capability to ask about, `h100` or `90`; this machine when None.
        tensor_parallel: size of the tensor-parallel group.

    Returns:
        see `maca_serve.doctor.findings.describe`.

    Raises:
        UserError: no checkpoint, not quantized, unreadable files, or a target that is none.
        EngineError: vLLM died over the question.
    """
    return diagnose_cards(read_folder(folder), [gpu], tensor_parallel=tensor_parallel)[0]


def diagnose_cards(
    subject: Subject, gpus: Sequence[str | None], *, tensor_parallel: int = 1
) -> list[Diagnosis]:
    """The same for several cards, for which vLLM is imported once.

    Args:
        subject: from `read_folder` or `read_shapes`.
        gpus: cards or compute capabilities as `diagnose` takes them; None is this machine.
        tensor_parallel: as `diagnose`.

    Raises:
        UserError: a target that is none.
        EngineError: as `diagnose`.
    """
    if tensor_parallel < 1:
        raise UserError(f"--tp: {tensor_parallel} is not positive")
    question = {
        "config": subject.config,
        "sizes": subject.contents.sizes,
        "quantized": sorted(subject.contents.quantized),
        "tensors": subject.tensors,
        "whole": subject.whole,
        "capabilities": [None if gpu is None else parse_capability(gpu) for gpu in gpus],
        "tensor_parallel": tensor_parallel,
        "variants": variants(subject.config["quantization_config"], tensor_parallel),
    }
    return [
        findings.describe(subject.name, subject.scheme, subject.config, subject.contents, answer)
        for answer in ask(question)["answers"]
    ]


def read_folder(folder: str | Path) -> Subject:
    """A checkpoint folder, its tensors checked against its scheme; no weights are loaded.

    Raises:
        UserError: no checkpoint, not quantized, or unreadable files.
    """
    checkpoint = open_checkpoint(Path(folder))
    quantization = _quantization(checkpoint.config, str(folder))
    tensors = read_headers(checkpoint.path)
    contents = check(tensors, quantization)
    check_values(contents, tensors)
    described = describe_tensors(tensors)
    return Subject(str(folder), checkpoint.config, contents, checkpoint.scheme, described, True)


def read_shapes(file: str | Path) -> Subject:
    """A checkpoint that is only planned: for kernels, without tensors to check.

    Args:
        file: JSON with `config`, a model config with `quantization_config`, and `layers`,
            {module name: [output features, input features]}.

    Raises:
        UserError: not such a JSON.
    """
    config, sizes = _read_sizes(Path(file))
    quantization = _quantization(config, f"{file}: config")
    contents = check_sizes(sizes, quantization)
    planned = planned_tensors(sizes, quantization)
    return Subject(str(file), config, contents, describe_scheme(config), planned, False)


def parse_capability(text: str) -> int:
    """Compute capability as an integer, 90 for `90`, `9.0`, `sm90`, `sm_90a` or `h100`.

    Raises:
        UserError: not one.
    """
    if capability := CARDS.get(_BRANDS.sub("", text).lower()):
        return capability
    match = _CAPABILITY.fullmatch(text.strip())
    if match is None or int(match[1]) not in MAJORS:
        raise UserError(
            f"--gpu: {text!r} is no card that is known here and no compute capability; give for"
            " instance a100 (80), l40s (89), h100 (90), b200 (100) or 5090 (120)"
        )
    return 10 * int(match[1]) + int(match[2])


def _quantization(config: dict[str, Any], where: str) -> dict[str, Any]:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization:
        raise UserError(
            f"{where}: not quantized (no quantization_config in its config.json), so no low-bit"
            " kernel is to be chosen; give a quantized checkpoint"
        )
    if not quantization.get("quant_method"):
        raise UserError(
            f"{where}: its quantization_config names no quant_method, by which vLLM tells formats"
            " apart; write it again with its tool"
        )
    if not config.get("architectures"):
        raise UserError(
            f"{where}: names no architectures, by which vLLM finds its model class; add for"
            ' instance "architectures": ["LlamaForCausalLM"]'
        )
    return quantization


def _read_sizes(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    if not file.is_file():
        raise UserError(f"--shapes: {file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, dict) or not layers or not isinstance(value.get("config"), dict):
        raise UserError(
            f'{file}: wants {{"config": {{...}}, "layers": {{"module": [out, in], ...}}}}'
        )
    for name, size in layers.items():
        if not (isinstance(size, list) and len(size) == 2 and all(_is_width(n) for n in size)):
            raise UserError(f"{file}: {name} is {size!r}, not [output features, input features]")
    return value["config"], {name: (out, width) for name, (out, width) in layers.items()}


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
