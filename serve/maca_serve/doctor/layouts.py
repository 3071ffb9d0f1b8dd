"""The tensors that each storage format gives a quantized module of known size.

compressed-tensors: docs of that library, formats `pack-quantized`, `int-quantized`,
`float-quantized`, `naive-quantized`, `nvfp4-pack-quantized`, `mxfp4-pack-quantized`. AutoGPTQ and
AutoAWQ: the tensors of their linear layers; AutoRound writes one of these two.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

FLOATS = ("BF16", "F16", "F32")
# One scale for all: some writers keep the dimension of length one, others do not.
ONE = ((1,), ())


@dataclass(frozen=True)
class Expected:
    """What one tensor must be.

    Attributes:
        dtypes: safetensors' names of the types it may have.
        shapes: the shapes it may have.
        required: whether it must be there.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True


@dataclass(frozen=True)
class Inputs:
    """How a module's activations are rounded while the model runs.

    Attributes:
        bits: of a code.
        kind: `int` or `float`.
        strategy: which of them share a scale: `token`, `tensor`, `group`, `tensor_group`.
        symmetric: without a zero point.
        static: whether the scale is stored.
    """

    bits: int
    kind: str
    strategy: str
    symmetric: bool
    static: bool


@dataclass(frozen=True)
class Scheme:
    """How a module is stored.

    Attributes:
        format: the storage format, for instance `pack-quantized`, `gptq` or `awq`.
        bits: of a code.
        group_size: input features that share a scale; None for a scale per channel, per tensor
            or per block.
        strategy: `group`, `channel`, `tensor`, `block` or `tensor_group`.
        symmetric: without zero points.
        kind: `int` or `float`.
        block: rows and columns that share a scale, of strategy `block`.
        inputs: how activations are rounded; None where they stay as they are.
        actorder: order of columns by which it was quantized, as the config says.
        zero_offset: what is to be added to stored zero points; AutoGPTQ stores one less.
    """

    format: str
    bits: int
    group_size: int | None = None
    strategy: str = "group"
    symmetric: bool = True
    kind: str = "int"
    block: tuple[int, int] | None = None
    inputs: Inputs | None = None
    actorder: str | None = None
    zero_offset: int = 0

    def groups(self, width: int) -> int:
        """Scales per row of a module with so many input features."""
        return ceil(width / self.group_size) if self.group_size else 1


def words(codes: int, bits: int) -> int:
    """32-bit words that hold so many codes packed densely, also where codes straddle words."""
    return ceil(codes * bits / 32)


def known(scheme: Scheme) -> bool:
    """Whether the format's tensors are known here."""
    return scheme.format in _LAYOUTS


def expected(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    """Tensors of a module by suffix.

    Args:
        scheme: how it is stored.
        out: output features.
        width: input features.
    """
    tensors: dict[str, Expected] = _LAYOUTS[scheme.format](scheme, out, width)
    if scheme.inputs and scheme.inputs.static:
        tensors["input_scale"] = Expected(FLOATS, ONE)
    return tensors


def module_size(
    scheme: Scheme, shapes: dict[str, tuple[int, ...]], stored: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """(output features, input features) of a module, None when its code tensor is missing.

    Args:
        scheme: how it is stored.
        shapes: of its tensors, by suffix.
        stored: values of `weight_shape`, which dense packing of 3 bits cannot do without.
    """
    if stored is not None and len(stored) == 2:
        return stored[0], stored[1]
    if scheme.format == "gptq" and "qweight" in shapes:
        rows, out = shapes["qweight"]
        return out, rows * 32 // scheme.bits
    if scheme.format == "awq" and "qweight" in shapes:
        width, columns = shapes["qweight"]
        return columns * 32 // scheme.bits, width
    if "weight_packed" in shapes:
        out, columns = shapes["weight_packed"]
        per_word = 2 if scheme.format in _BYTE_PACKED else 32 / scheme.bits
        return out, int(columns * per_word)
    if "weight" in shapes:
        out, width = shapes["weight"]
        return out, width
    return None


def _packed(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    groups = scheme.groups(width)
    tensors = {
        "weight_packed": Expected(("I32",), ((out, words(width, scheme.bits)),)),
        "weight_scale": Expected(FLOATS, _scale_shapes(scheme, out, width)),
        "weight_shape": Expected(("I64", "I32"), ((2,),)),
        # Only order by groups needs it, and that vLLM refuses by the config.
        "weight_g_idx": Expected(("I32",), ((width,),), required=False),
    }
    if not scheme.symmetric:
        shape = (words(out, scheme.bits), groups)
        tensors["weight_zero_point"] = Expected(("I32",), (shape,))
    return tensors


def _plain(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    dtype = "I8" if scheme.kind == "int" else "F8_E4M3"
    shapes = _scale_shapes(scheme, out, width)
    tensors = {
        "weight": Expected((dtype,), ((out, width),)),
        "weight_scale": Expected(FLOATS, shapes),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = Expected((dtype,), shapes)
    return tensors


def _scale_shapes(scheme: Scheme, out: int, width: int) -> tuple[tuple[int, ...], ...]:
    if scheme.strategy == "tensor":
        return ONE
    if scheme.block is not None:
        return ((ceil(out / scheme.block[0]), ceil(width / scheme.block[1])),)
    return ((out, scheme.groups(width)),)


def _nvfp4(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    return {
        "weight_packed": Expected(("U8",), ((out, width // 2),)),
        "weight_scale": Expected(("F8_E4M3",), ((out, scheme.groups(width)),)),
        "weight_global_scale": Expected(("F32",), ONE),
        "input_global_scale": Expected(("F32",), ONE, required=False),
    }


def _mxfp4(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    return {
        "weight_packed": Expected(("U8",), ((out, width // 2),)),
        "weight_scale": Expected(("U8", "F8_E8M0"), ((out, scheme.groups(width)),)),
    }


def _gptq(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    groups = scheme.groups(width)
    return {
        "qweight": Expected(("I32",), ((words(width, scheme.bits), out),)),
        "qzeros": Expected(("I32",), ((groups, words(out, scheme.bits)),)),
        "scales": Expected(FLOATS, ((groups, out),)),
        "g_idx": Expected(("I32",), ((width,),), required=False),
    }


def _awq(scheme: Scheme, out: int, width: int) -> dict[str, Expected]:
    groups = scheme.groups(width)
    return {
        "qweight": Expected(("I32",), ((width, words(out, scheme.bits)),)),
        "qzeros": Expected(
            ("I32",), ((groups, words(out, scheme.bits)),), scheme.symmetric is False
        ),
        "scales": Expected(FLOATS, ((groups, out),)),
    }


_BYTE_PACKED = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_LAYOUTS: dict[str, Any] = {
    "pack-quantized": _packed,
    "int-quantized": _plain,
    "float-quantized": _plain,
    "naive-quantized": _plain,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}
