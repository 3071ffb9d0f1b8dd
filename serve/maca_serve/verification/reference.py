"""The checkpoint in transformers on this machine's CPU, its weights dequantized by our own code.

Nothing is left to the compressed-tensors of this environment: it reads 3 bits wrongly (see
`maca_serve.formats.packing`), and rounds activations otherwise than vLLM (see `rounding`).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from maca_llmc.common.errors import first_line
from maca_llmc.common.memory import available_memory
from maca_serve.doctor.checks import check
from maca_serve.doctor.headers import Tensor, read_headers
from maca_serve.doctor.layouts import Inputs, Scheme
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.formats.checkpoint import Checkpoint
from maca_serve.formats.dequantization import FORMATS, dequantize
from maca_serve.verification.rounding import RoundedLinear, can_round

GIB = 1024**3
# Of a parameter: bfloat16 twice while it is loaded, then float32 beside it.
BYTES = 8


# Tensors of a quantized module that the unquantized one does not have.
CODES = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("qweight", "scales", "qzeros", "g_idx"),
)


class NoReference(Exception):  # noqa: N818  (an outcome, which the table of checks shows)
    """Why transformers cannot say what this checkpoint computes."""


@dataclass
class Weights:
    """Weights of a checkpoint by the names of the unquantized model.

    Attributes:
        plain: all of them.
        rounded: those of modules whose activations are rounded, in float32, and how, by module.
    """

    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    rounded: dict[str, tuple[torch.Tensor, Inputs]] = field(default_factory=dict)


def load_reference(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in bfloat16, ready to be asked.

    Args:
        checkpoint: not quantized, or in a format of `formats.dequantization`, its activations
            as they are or rounded in a way of `rounding.can_round`.
        dtype: what the engine computes in, to which it rounds the scales of weights when it loads
            them; tools of GPTQ, AWQ and AutoRound store them in float16.

    Raises:
        NoReference: another format, too little memory, or a model that transformers cannot load.
        UserError: files that cannot be read.
    """
    quantization = checkpoint.config.get("quantization_config") or {}
    _check_format(quantization)
    headers = read_headers(checkpoint.path)
    contents = check(headers, quantization)
    schemes = _schemes(quantization, contents.quantized)
    sizes = {module: contents.sizes[module] for module in schemes}
    _check_memory(headers, sizes)
    weights = read_weights(headers, schemes, sizes, dtype)
    try:
        model = _load(checkpoint.path, weights.plain)
        _round_inputs(model, weights.rounded)
    except Exception as error:  # whatever it stumbles over is the reason
        raise NoReference(f"transformers cannot load it: {first_line(error)}") from error
    return model


def read_weights(
    headers: dict[str, Tensor],
    schemes: dict[str, Scheme],
    sizes: dict[str, tuple[int, int]],
    dtype: torch.dtype,
) -> Weights:
    """All weights of a checkpoint.

    Args:
        headers: of its files.
        schemes: of modules that hold codes.
        sizes: (output features, input features) of the same.
        dtype: of scales, see `load_reference`.
    """
    weights = Weights()
    for module, parts in _read(headers).items():
        if module in schemes:
            scheme = schemes[module]
            scale = "scales" if "scales" in parts else "weight_scale"
            # Kernels of rounded inputs multiply codes, and scale the sums in float32.
            parts[scale] = parts[scale].to(torch.float32 if scheme.inputs else dtype)
            parts["weight"] = dequantize(parts, scheme, sizes[module])
            if scheme.inputs:
                weights.rounded[module] = parts["weight"], scheme.inputs
                parts["weight"] = parts["weight"].bfloat16()
        weights.plain |= {
            f"{module}.{suffix}" if module else suffix: tensor
            for suffix, tensor in parts.items()
            if suffix not in CODES
        }
    return weights


def _read(headers: dict[str, Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors, by module and suffix."""
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for file in sorted({tensor.file for tensor in headers.values()}):
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  (not a dictionary)
                module, _, suffix = name.rpartition(".")
                modules[module][suffix] = source.get_tensor(name)
    return modules


def _schemes(quantization: dict[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """How modules with codes are stored, where that can be dequantized."""
    find = scheme_finder(quantization)
    found = {}
    for module in modules:
        scheme = find(module) if find else None
        if scheme is None:
            raise NoReference(f"{module} holds codes and quantization_config does not say how")
        inputs = scheme.inputs
        if inputs and not can_round(inputs):
            how = f"{inputs.bits}-bit {inputs.kind}, {'static' if inputs.static else 'dynamic'}"
            why = "what they are rounded to hangs on the kernel"
            raise NoReference(f"activations are {how} per {inputs.strategy}: {why}")
        if scheme.format not in FORMATS:
            raise NoReference(f"{scheme.format} is not dequantized here, only {', '.join(FORMATS)}")
        found[module] = scheme
    return found


def _check_format(quantization: dict[str, Any]) -> None:
    if quantization and scheme_finder(quantization) is None:
        raise NoReference(f"{quantization.get('quant_method')} is not dequantized here")
    if quantization.get("kv_cache_scheme"):
        raise NoReference("its KV cache is quantized, and the reference's is not")
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


def _round_inputs(model: Any, rounded: dict[str, tuple[torch.Tensor, Inputs]]) -> None:
    """Put layers that round their inputs where the checkpoint says that they are rounded."""
    for name, (weight, inputs) in rounded.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is no Linear there but {type(layer).__name__}")
        model.set_submodule(name, RoundedLinear(weight, layer.bias, inputs))
