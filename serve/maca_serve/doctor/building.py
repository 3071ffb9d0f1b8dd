"""vLLM's own layer of one shape, on the meta device: parameters have shapes and no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from maca_serve.doctor.fusing import Layer


@contextmanager
def as_rank_of(engine: Any, tensor_parallel: int, dtype: torch.dtype) -> Iterator[None]:
    """Let vLLM build layers as the first rank of a tensor-parallel group that does not exist.

    Args:
        engine: a default `VllmConfig`.
        tensor_parallel: size of the group.
        dtype: what the model computes in.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    # Only the dtype is read while layers are built; a real one would need a model folder.
    object.__setattr__(engine, "model_config", SimpleNamespace(dtype=dtype))
    group = SimpleNamespace(world_size=tensor_parallel, rank_in_group=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            patch.object(parallel_state, "_TP", group),
            set_current_vllm_config(engine),
            torch.device("meta"),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def build(layer: Layer, config: dict[str, Any], quantization: Any) -> Any:
    """Build a layer; vLLM chooses its kernel meanwhile.

    Args:
        layer: what to build; of unknown kind it is not split.
        config: the text model's config, for the heads of a fused q, k and v.
        quantization: vLLM's quantization config.

    Raises:
        Exception: whatever vLLM raises where it would not load the layer.
    """
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    common: dict[str, Any] = {"quant_config": quantization, "prefix": layer.name, "bias": False}
    out = sum(layer.outs)
    if layer.kind == "ParallelLMHead":
        return ParallelLMHead(out, layer.width, **common)
    if layer.kind == "QKVParallelLinear":
        size, heads, kv_heads = _heads(layer, config)
        return linear.QKVParallelLinear(layer.width, size, heads, kv_heads, **common)
    if layer.kind == "MergedColumnParallelLinear":
        # A checkpoint that stores gate and up in one has two of equal size.
        outs = list(layer.outs) if len(layer.outs) > 1 else [out // 2, out // 2]
        return linear.MergedColumnParallelLinear(layer.width, outs, **common)
    kind = getattr(linear, layer.kind or "ReplicatedLinear")
    return kind(layer.width, out, **common)


def _heads(layer: Layer, config: dict[str, Any]) -> tuple[int, int, int]:
    """(head size, query heads, key heads); from the parts where there are parts."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    if len(layer.outs) == 3:
        # Some models put a gate beside the queries: then there are more rows than heads.
        return size, layer.outs[0] // size, layer.outs[1] // size
    return size, heads, config.get("num_key_value_heads") or heads


def share(layer: Layer, ranks: int) -> list[int]:
    """[output, input] features of a rank, for a layer that vLLM would not build.

    Key heads that are fewer than ranks are repeated, which is left out here.
    """
    out = sum(layer.outs)
    if layer.kind in (None, "ReplicatedLinear"):
        return [out, layer.width]
    if layer.kind == "RowParallelLinear":
        return [out, layer.width // ranks]
    return [out // ranks, layer.width]
