"""Hold what is written to what was computed: no value that nothing set, and no other values.

compressed-tensors makes scales of memory as it finds it, and a compressor may round what it is
given once more. Scales start as NaN here, so that one which nothing set is seen, and weights are
read back from what was written.
"""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.utils import get_direct_state_dict
from safetensors import safe_open

from maca_llmc.common.errors import CalibrationError, UserError
from maca_llmc.llmcompressor_api import (
    initialize_observer,
    observe,
    update_offload_parameter,
    update_qparams,
)

Tensors = dict[str, torch.Tensor]

TOLERANCE = 0.01
"""Relative difference of weights that were written and read: bfloat16 scales alone take 0.002."""

SAMPLED_ROWS = 256


def mark_unset(model: torch.nn.Module) -> None:
    """Make every scale of a model whose schemes were just attached NaN."""
    for _, module in quantized(model):
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_scale"):
                update_offload_parameter(module, name, torch.full_like(parameter, torch.nan))


def check_set(model: torch.nn.Module, within: str = "") -> None:
    """Refuse a scale that nothing has set, or that is not finite.

    :param within: what to put before names
    :raises CalibrationError: names it
    """
    for prefix, module in quantized(model):
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_scale") and not _is_finite(parameter):
                path = f"{within}{prefix}"
                raise CalibrationError(
                    f"{path}.{name} is not finite: no calibration token reached {path}, or its "
                    "weights are not finite; leave it out (ignore) or calibrate with other data"
                )


def quantized(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of what has a scheme."""
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            yield name, module


@dataclass
class Sample:
    """Some rows of a quantized weight.

    :param name: of its module
    :param rows: every so-manieth row, ``SAMPLED_ROWS`` at most
    """

    name: str
    rows: torch.Tensor

    @classmethod
    def of(cls, name: str, weight: torch.Tensor) -> "Sample":
        """Take some rows."""
        return cls(name, _sampled(weight).clone())

    def matches(self, weight: torch.Tensor) -> bool:
        """Whether a weight that was read holds these rows."""
        rows = _sampled(weight)
        return rows.shape == self.rows.shape and difference(rows, self.rows) <= TOLERANCE


def sample_weights(model: torch.nn.Module, solved: Container[str]) -> list[Sample]:
    """Of a model that is about to be saved: one weight of each scheme and kind of module.

    :param solved: names of modules whose weights are quantized ones already; those of all others
        are rounded when they are saved
    """
    found: dict[tuple[int, str], Sample] = {}
    for name, module in quantized(model):
        args = module.quantization_scheme.weights
        kind = id(module.quantization_scheme), name.rpartition(".")[2]
        if args is not None and kind not in found:
            weight = module.weight.detach()
            if name not in solved:
                weight = forward_quantize(module, weight, "weight", args)
            found[kind] = Sample.of(name, weight)
    return list(found.values())


def check_written(model: torch.nn.Module, folder: Path, samples: list[Sample]) -> None:
    """Check a checkpoint: every number is finite, and sampled weights are read as they were.

    :param model: as it was saved, with the schemes it was compressed by
    :param samples: from before it was saved
    :raises UserError: names what is not as it was computed
    """
    files = _check_finite(folder)
    schemes = {name: module.quantization_scheme for name, module in quantized(model)}
    for sample in samples:
        read = (_read(files, prefix) for prefix in _candidates(files, sample.name))
        scheme = schemes[sample.name]
        if not any(sample.matches(decompressed(state, scheme)) for state in read):
            raise UserError(
                f"{sample.name} was not written with the values that were computed "
                f"({scheme.format}): use another scheme, and report this"
            )


def check_roundtrip(name: str, scheme: QuantizationScheme) -> None:
    """Refuse a scheme with which a weight could not be written, or only with other values.

    A small weight is quantized, compressed and read back.

    :param name: of the scheme in its recipe
    :raises CalibrationError: says what is wrong with it
    """
    scheme = scheme.model_copy(deep=True)
    args = scheme.weights
    assert args is not None
    args.observer = None  # some want to see activations
    module = _small_linear(args)
    try:
        initialize_module_for_quantization(module, scheme)
        initialize_observer(module, "weight")
        observe(module, "weight")
        update_qparams(module, "weight")
        del module.weight_observer
        weight = forward_quantize(module, module.weight, "weight", args)
        module.weight.copy_(weight)
        state = get_direct_state_dict(module)
        read = decompressed(_compressor(scheme).compress(state, scheme), scheme)
    except (ArithmeticError, LookupError, ValueError, TypeError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"the recipe's {name} cannot be written ({said}): use a preset scheme such as W4A16"
        ) from error
    if difference(read, weight) > TOLERANCE:
        raise CalibrationError(
            f"the recipe's {name} would be written with other values than those computed "
            f"(relative difference {difference(read, weight):.2g}): {_cure(args)}"
        )


def decompressed(state: Tensors, scheme: QuantizationScheme) -> torch.Tensor:
    """The weight that a compressed module's tensors stand for."""
    return _compressor(scheme).decompress(state, scheme)["weight"]


def difference(read: torch.Tensor, computed: torch.Tensor) -> float:
    """Relative to what was computed, in norm; NaN counts as infinite."""
    computed = computed.float()
    error = torch.linalg.norm(read.float().to(computed.device) - computed)
    relative = float(error / torch.linalg.norm(computed).clamp_min(torch.finfo(torch.float32).tiny))
    return math.inf if math.isnan(relative) else relative


def _cure(args: Any) -> str:
    if args.num_bits == 4 and args.type == "float":
        return (
            "float 4-bit scales need a scale_dtype (torch.uint8 for groups of 32, "
            "torch.float8_e4m3fn by tensor_group of 16), as the presets MXFP4A16 and NVFP4A16 have"
        )
    return "use a preset scheme such as W4A16"


def _small_linear(args: Any) -> Any:
    rows, width = args.block_structure or (16, max(args.group_size or 0, 32))
    module = torch.nn.Linear(2 * width, 2 * rows, bias=False, device="cpu", dtype=torch.bfloat16)
    module.requires_grad_(False)
    values = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    module.weight.copy_(values)
    return module


def _compressor(scheme: QuantizationScheme) -> Any:
    kind = scheme.format or infer_module_format(torch.nn.Linear, scheme)
    return BaseCompressor.get_value_from_registry(CompressionFormat(kind).value)


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    return weight[:: max(1, len(weight) // SAMPLED_ROWS)][:SAMPLED_ROWS]


def _check_finite(folder: Path) -> dict[str, Path]:
    """The file of each tensor, all of which are finite."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                files[name] = path
                if not _is_finite(file.get_tensor(name)):
                    raise UserError(
                        f"{name} is not finite and would be in the checkpoint: check the base "
                        "model's weights"
                    )
    return files


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # float8 has few operations
        tensor = tensor.to(torch.float32)
    return bool(torch.isfinite(tensor).all())


def _candidates(files: dict[str, Path], name: str) -> list[str]:
    """Which written modules may be this one: a checkpoint's names may begin or end otherwise."""
    written = [key.removesuffix(".weight_scale") for key in files if key.endswith(".weight_scale")]
    if name in written:
        return [name]
    parts = name.split(".")
    layer = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    within = ".".join(parts[max(layer - 1, 0) :])
    alike = [prefix for prefix in written if prefix.endswith(within)]
    return alike or [prefix for prefix in written if f".{parts[layer]}." in prefix]


def _read(files: dict[str, Path], prefix: str) -> Tensors:
    state = {}
    for key, path in files.items():
        if key.rpartition(".")[0] == prefix:
            with safe_open(path, framework="pt") as file:
                state[key.rpartition(".")[2]] = file.get_tensor(key)
    return state
