"""Tensors of a checkpoint against the scheme that its config declares."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.doctor.headers import Tensor, read_headers, read_integers
from maca_serve.doctor.layouts import Expected, Scheme, expected, known, module_size, words
from maca_serve.doctor.scales import find_scales, read_values
from maca_serve.doctor.schemes import scheme_finder

GROUP_SIZES = (128, 64, 32)
# A module with one of these is quantized; a plain one has `weight` alone (and maybe `bias`).
MARKS = ("weight_packed", "weight_scale", "qweight", "scales", "weight_scale_inv", "qzeros")


@dataclass
class Problem:
    """Something wrong, or worth knowing, in one or many modules.

    Attributes:
        severity: `error` (it would not load or not compute what it should), `warning` or `note`.
        what: what is wrong.
        cure: what to change; empty where nothing is to be done.
        modules: the modules it was seen in.
    """

    severity: str
    what: str
    cure: str = ""
    modules: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """As it goes into the JSON answer."""
        return {
            "severity": self.severity,
            "what": self.what,
            "cure": self.cure,
            "count": len(self.modules),
            "modules": self.modules[:3],
        }


@dataclass
class Contents:
    """What the headers say.

    Attributes:
        sizes: (output features, input features) of every module with a matrix, by name.
        quantized: names of those that are stored quantized.
        problems: tensors that disagree with the config.
        signed: names of quantized modules with negative scales.
    """

    sizes: dict[str, tuple[int, int]]
    quantized: set[str]
    problems: list[Problem]
    signed: set[str] = field(default_factory=set)


def check(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Contents:
    """Check every quantized tensor's name, dtype and shape against the config.

    Args:
        tensors: the folder's headers.
        quantization: its `quantization_config`; empty for a model that is not quantized.

    Raises:
        UserError: a config that lacks what its method needs.
    """
    find = scheme_finder(quantization)
    contents = Contents({}, set(), [])
    complaints: dict[tuple[str, str], list[str]] = defaultdict(list)
    unknown: list[str] = []
    for module, parts in _modules(tensors).items():
        if not any(mark in parts for mark in MARKS):
            if "weight" in parts and len(parts["weight"].shape) == 2:
                out, width = parts["weight"].shape
                contents.sizes[module] = (out, width)
            continue
        contents.quantized.add(module)
        scheme = find(module) if find else None
        if find is None or (scheme is not None and not known(scheme)):
            unknown.append(module)
            continue
        if scheme is None:
            complaints[_UNDECLARED].append(module)
            continue
        for complaint in _check_module(contents, module, parts, scheme):
            complaints[complaint].append(module)
    contents.problems += [
        Problem("error", what, cure, modules) for (what, cure), modules in complaints.items()
    ]
    if unknown and not quantization:
        what = "stored quantized, and config.json has no quantization_config"
        cure = "take the config.json that came with these files"
        contents.problems.append(Problem("error", what, cure, unknown))
    elif unknown:
        contents.problems.append(_not_checked(quantization, unknown))
    return contents


_UNDECLARED = (
    "stored quantized, but quantization_config does not cover it",
    "take it out of `ignore` or name it in the targets of a config group",
)
_AGAIN = "the checkpoint was not written as its config says: quantize or convert it again"


def _modules(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules[module][suffix] = tensor
    return modules


def _check_module(
    contents: Contents, module: str, parts: dict[str, Tensor], scheme: Scheme
) -> Iterable[tuple[str, str]]:
    shapes = {suffix: tensor.shape for suffix, tensor in parts.items()}
    try:
        size = module_size(scheme, shapes, _stored_size(parts.get("weight_shape")))
    except ValueError:
        yield f"codes are not a matrix but {_shown(shapes)}", _AGAIN
        return
    if size is None:
        yield f"scales but no codes: it has {', '.join(sorted(parts))}", _AGAIN
        return
    contents.sizes[module] = size
    if (misfit := group_misfit(scheme, size[1])) is not None:
        yield misfit
    for suffix, wanted in expected(scheme, *size).items():
        tensor = parts.get(suffix)
        if tensor is None:
            if wanted.required:
                yield f"{suffix} is missing", _AGAIN
            continue
        if tensor.dtype not in wanted.dtypes:
            yield f"{suffix} is {tensor.dtype}, not {' or '.join(wanted.dtypes)}", _AGAIN
        if tensor.shape not in wanted.shapes:
            yield _wrong_shape(suffix, tensor, wanted, scheme, size)
    if scheme.symmetric and "weight_zero_point" in parts:
        yield "has zero points, and the config says symmetric", _AGAIN


def group_misfit(scheme: Scheme, width: int) -> tuple[str, str] | None:
    """(what is wrong, what to do) where groups do not divide the input features."""
    if not scheme.group_size or width % scheme.group_size == 0:
        return None
    fitting = [size for size in GROUP_SIZES if width % size == 0]
    sizes = " or ".join(map(str, fitting)) or "none of the usual group sizes fits"
    return (
        f"{width} input features are not a multiple of group size {scheme.group_size}",
        f"quantize with group size {sizes}, or with one scale per channel"
        if fitting
        else f"{sizes}: quantize with one scale per channel",
    )


def heads_misfit(config: dict[str, Any], ranks: int) -> tuple[str, str] | None:
    """(what is wrong, what to do) where ranks do not divide the attention heads."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads")
    if not heads or heads % ranks == 0:
        return None
    widths = [heads, text.get("intermediate_size")]  # of which some models have several
    shared = math.gcd(*(width for width in widths if isinstance(width, int)))
    fits = [str(n) for n in range(1, shared + 1) if shared % n == 0]
    what = f"{heads} attention heads cannot be shared by {ranks} tensor-parallel ranks"
    return what, f"use a tensor-parallel size of {', '.join(fits)}"


def require_sound(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder whose files are not whole, or whose tensors are not as its config says.

    Reads headers and scales only, so that no hours are spent before the last checkpoint turns out
    broken. Weights in *.bin files have none and are left to vLLM.

    Raises:
        UserError: see `read_headers` and `check`, or a scale that is no number; of several
            problems the first.
    """
    if not any(folder.glob("*.safetensors")):
        return
    tensors = read_headers(folder)
    contents = check(tensors, config.get("quantization_config") or {})
    check_values(contents, tensors)
    refuse_errors(folder, contents)


def check_values(contents: Contents, tensors: dict[str, Tensor]) -> None:
    """Read scales and norms, and add to the contents what they say.

    Args:
        contents: from `check`.
        tensors: the folder's headers.
    """
    values = read_values(find_scales(tensors))
    if values.broken:
        what = Problem("error", "holds NaN or infinity", "quantize again", values.broken)
        contents.problems.append(what)
    if values.impossible:
        why = "is not above zero, and activations are divided by it"
        contents.problems.append(Problem("error", why, "quantize again", values.impossible))
    modules = {name.rpartition(".")[0] for name in values.negative}
    contents.signed = modules & contents.quantized


def planned_tensors(
    sizes: dict[str, tuple[int, int]], quantization: dict[str, Any]
) -> dict[str, tuple[str, list[int]]]:
    """(type, shape) of the tensors that modules would have, by name.

    Args:
        sizes: (output features, input features) by module.
        quantization: the `quantization_config`.
    """
    find = scheme_finder(quantization)
    planned: dict[str, tuple[str, list[int]]] = {}
    for module, (out, width) in sizes.items():
        scheme = find(module) if find else None
        if find is None or (scheme is not None and not known(scheme)):
            continue
        if scheme is None:
            planned[f"{module}.weight"] = "BF16", [out, width]
            continue
        for suffix, tensor in expected(scheme, out, width).items():
            if tensor.required:
                planned[f"{module}.{suffix}"] = tensor.dtypes[0], list(tensor.shapes[0])
    return planned


def refuse_errors(folder: Path, contents: Contents) -> None:
    """Raise UserError for the first error among what was found."""
    errors = [problem for problem in contents.problems if problem.severity == "error"]
    if errors:
        first = errors[0]
        raise UserError(f"{folder}: {first.modules[0]}: {first.what}: {first.cure}")


def check_sizes(sizes: dict[str, tuple[int, int]], quantization: dict[str, Any]) -> Contents:
    """The same for modules that are only planned: their sizes against the config.

    Args:
        sizes: (output features, input features) by module.
        quantization: the `quantization_config`.

    Raises:
        UserError: as `check`.
    """
    find = scheme_finder(quantization)
    contents = Contents(sizes, set(), [])
    for module, (_, width) in sizes.items():
        scheme = find(module) if find else None
        if find is not None and scheme is None:
            continue
        contents.quantized.add(module)
        if scheme is not None and (misfit := group_misfit(scheme, width)) is not None:
            contents.problems.append(Problem("error", *misfit, [module]))
    return contents


def _stored_size(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Values of weight_shape, which are no weights: two numbers."""
    if tensor is None or tensor.dtype != "I64" or tensor.shape != (2,):
        return None
    return read_integers(tensor)


def _wrong_shape(
    suffix: str, tensor: Tensor, wanted: Expected, scheme: Scheme, size: tuple[int, int]
) -> tuple[str, str]:
    shapes = " or ".join(str(list(shape)) for shape in wanted.shapes)
    what = f"{suffix} is {list(tensor.shape)}, not {shapes}"
    # compressed-tensors before dense packing left the bits over of every word unused.
    sparse = -(-size[1] // (32 // scheme.bits))
    if suffix == "weight_packed" and tensor.shape == (size[0], sparse):
        return (
            f"{what}: {32 // scheme.bits} codes of {scheme.bits} bits per word, where vLLM reads"
            f" {words(size[1], scheme.bits)} words packed densely",
            "write it with compressed-tensors 0.19 or newer",
        )
    return what, _AGAIN


def _not_checked(quantization: dict[str, Any], modules: list[str]) -> Problem:
    method = quantization.get("quant_method", "no quant_method")
    form = quantization.get("format") or quantization.get("packing_format")
    name = f"{method} ({form})" if form else str(method)
    return Problem(
        "warning", f"tensors of format {name} are not known here and not checked", "", modules
    )


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{suffix} {list(shape)}" for suffix, shape in sorted(shapes.items()))
