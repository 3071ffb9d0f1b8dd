"""The checkpoint in transformers on this machine's CPU, its weights dequantized by our own code.

Nothing is left to the compressed-tensors of this environment: it reads 3 bits wrongly (see
`maca_serve.packing`).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from maca_serve.checkpoint import Checkpoint
from maca_serve.dequantization import PACKED, dequantize
from maca_serve.doctor.checks import check
from maca_serve.doctor.headers import Tensor, read_headers
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.machine import available_memory

GIB = 1024**3
# Of a parameter: bfloat16 twice while it is loaded, then float32 beside it.
BYTES = 8


class NoReference(Exception):  # noqa: N818  (an outcome, which the table of checks shows)
    """Why transformers cannot say what this checkpoint computes."""


def load_reference(checkpoint: Checkpoint) -> Any:
    """The model in bfloat16, ready to be asked.

    Args:
        checkpoint: weight-only pack-quantized, or not quantized.

    Raises:
        NoReference: another format, too little memory, or a model that transformers cannot load.
        UserError: files that cannot be read.
    """
    quantization = checkpoint.config.get("quantization_config") or {}
    _check_format(quantization)
    headers = read_headers(checkpoint.path)
    sizes = check(headers, quantization).sizes if quantization else {}
    _check_memory(headers, sizes)
    weights = read_weights(headers, quantization, sizes)
    try:
        return _load(checkpoint.path, weights)
    except Exception as error:  # whatever it stumbles over is the reason
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise NoReference(f"transformers cannot load it: {first}") from error


def read_weights(
    headers: dict[str, Tensor],
    quantization: dict[str, Any],
    sizes: dict[str, tuple[int, int]],
) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by the names of the unquantized model.

    Args:
        headers: of its files.
        quantization: its `quantization_config`; empty where it has none.
        sizes: (output features, input features) of modules that hold codes.
    """
    find = scheme_finder(quantization) if quantization else None
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for file in sorted({tensor.file for tensor in headers.values()}):
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  (not a dictionary)
                module, _, suffix = name.rpartition(".")
                modules[module][suffix] = source.get_tensor(name)
    weights: dict[str, torch.Tensor] = {}
    for module, parts in modules.items():
        if "weight_packed" in parts:
            scheme = find(module) if find else None
            if scheme is None:
                raise NoReference(f"{module} holds codes and quantization_config does not say how")
            parts["weight"] = dequantize(parts, scheme, sizes[module])
        weights |= {
            f"{module}.{suffix}" if module else suffix: tensor
            for suffix, tensor in parts.items()
            if not (suffix.startswith("weight_") and "weight_packed" in parts)
        }
    return weights


def _check_format(quantization: dict[str, Any]) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise NoReference(f"only compressed-tensors is dequantized here, and this is {method}")
    for group in (quantization.get("config_groups") or {}).values():
        if group.get("input_activations"):
            raise NoReference("its activations are quantized too, and the reference's are not")
        stored = group.get("format") or quantization.get("format")
        if stored != PACKED:
            raise NoReference(f"only {PACKED} is dequantized here, and this is {stored}")
    # what is merged into weights (weight_input, weight_output) is in the checkpoint already
    rotations = (quantization.get("transform_config") or {}).get("config_groups") or {}
    parts = [part for group in rotations.values() for part in group.get("apply", ())]
    if any(not str(part.get("location")).startswith("weight_") for part in parts):
        raise NoReference("it rotates activations while it runs, and the reference does not")


def _check_memory(headers: dict[str, Tensor], sizes: dict[str, tuple[int, int]]) -> None:
    plain = sum(
        torch.Size(tensor.shape).numel()
        for name, tensor in headers.items()
        if name.rpartition(".")[0] not in sizes
    )
    needed = BYTES * (plain + sum(out * width for out, width in sizes.values()))
    if needed > available_memory():
        raise NoReference(
            f"the reference takes {needed / GIB:.1f} GiB of memory and"
            f" {available_memory() / GIB:.1f} GiB are free"
        )


def _load(folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain by now
    # The class that vLLM goes by too; the Auto classes want a folder beside the weights.
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is None:
        raise ValueError(f"it has no {config.architectures[0]}")
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.bfloat16, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(f"no weight for {sorted(loading['missing_keys'])[0]}")
    return model.eval()
