"""What could be changed about a checkpoint or its target, to be tried on vLLM."""

import copy
from collections.abc import Iterator
from typing import Any

from maca_serve.doctor.checks import GROUP_SIZES

# The smallest container that every 4-bit kernel reads.
CONTAINER_BITS = 4
Variant = dict[str, Any]


def variants(quantization: dict[str, Any], tensor_parallel: int) -> list[Variant]:
    """Changes to try, cheapest first.

    Args:
        quantization: the `quantization_config`.
        tensor_parallel: ranks asked for.

    Returns:
        entries of the worker's question, with what to do in words under `change`.
    """
    return [
        *_fewer_ranks(quantization, tensor_parallel),
        _variant("serve with `--dtype float16`", quantization, tensor_parallel, dtype="float16"),
        *(
            _variant(change, edited, tensor_parallel)
            for change, edited in _quantizations(quantization)
            if edited != quantization
        ),
    ]


def _fewer_ranks(quantization: dict[str, Any], tensor_parallel: int) -> Iterator[Variant]:
    for ranks in range(tensor_parallel - 1, 0, -1):
        yield _variant(f"serve with a tensor-parallel size of {ranks}", quantization, ranks)


def _quantizations(quantization: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for size in GROUP_SIZES:
        yield f"quantize with group size {size}", _edit(quantization, group_size=size)
    yield "quantize with one scale per channel", _edit(quantization, group_size=None)
    yield "quantize without zero points", _edit(quantization, symmetric=True)
    yield (
        f"store it in {CONTAINER_BITS}-bit containers"
        " (`maca-serve repack DIR OUTPUT`, or `quantize --container 4`)",
        _edit(quantization, least_bits=CONTAINER_BITS),
    )


def _edit(quantization: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A copy with the change in it; unchanged where the method has nothing of the kind."""
    edited = copy.deepcopy(quantization)
    method = edited.get("quant_method")
    if method == "compressed-tensors":
        for group in (edited.get("config_groups") or {}).values():
            if (weights := group.get("weights")) and weights.get("type", "int") == "int":
                _edit_weights(weights, **change)
    elif method in ("gptq", "auto-round") and "group_size" in change:
        edited["group_size"] = change["group_size"] or -1
    return edited


def _edit_weights(weights: dict[str, Any], **change: Any) -> None:
    if "least_bits" in change:
        weights["num_bits"] = max(weights["num_bits"], change["least_bits"])
    if "symmetric" in change:
        weights["symmetric"] = True
    # A W8A8 scheme has no groups to choose.
    if "group_size" in change and weights.get("num_bits", 8) < 8:
        weights["group_size"] = change["group_size"]
        weights["strategy"] = "group" if change["group_size"] else "channel"


def _variant(
    change: str, quantization: dict[str, Any], tensor_parallel: int, dtype: str | None = None
) -> Variant:
    return {
        "change": change,
        "quantization_config": quantization,
        "tensor_parallel": tensor_parallel,
        "dtype": dtype,
    }
