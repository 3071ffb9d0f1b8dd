"""vLLM's own linear layer of one shape, on the meta device: parameters have no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import torch

from maca_serve.doctor.fusing import Layer

# A layer that every kernel's tiles divide: what is refused here is refused for the scheme.
ROOMY = 8192


class Subject(Protocol):
    """A layer to ask vLLM about."""

    def build(self, quantization: Any) -> Any:
        """Build vLLM's layer with its quantization config; it chooses its kernel meanwhile.

        Raises:
            Exception: whatever vLLM raises where it would not load the layer.
        """

    def build_roomy(self, quantization: Any) -> Any:
        """The same with widths of `ROOMY`."""

    def describe(self, built: Any) -> dict[str, Any]:
        """Name, class, parts and sizes; `built` is None where vLLM would not build it.

        `shape` is [output, input] features of the whole layer and `partition` of a rank's share of
        it; `outs` are output features of each fused part on a rank.
        """


class Linear:
    """A linear layer to ask vLLM about."""

    def __init__(self, layer: Layer, config: dict[str, Any], ranks: int) -> None:
        """Prepare.

        Args:
            layer: what to build.
            config: the text model's config.
            ranks: size of the tensor-parallel group.
        """
        self.layer, self.config, self.ranks = layer, config, ranks

    def build(self, quantization: Any) -> Any:
        """See `Subject`."""
        return build(self.layer, self.config, quantization)

    def build_roomy(self, quantization: Any) -> Any:
        """See `Subject`."""
        layer = self.layer
        roomy = Layer(layer.name, "ReplicatedLinear", layer.parts, (ROOMY,), ROOMY)
        return build(roomy, self.config, quantization)

    def describe(self, built: Any) -> dict[str, Any]:
        """See `Subject`."""
        layer = self.layer
        partition = _partition(built) or share(layer, self.ranks)
        shape = [sum(layer.outs), layer.width]
        return {
            "layer": layer.name,
            "class": layer.kind,
            "parts": list(layer.parts),
            "experts": None,
            # Of q, k and v vLLM may cut one and repeat the others.
            "outs": getattr(built, "output_partition_sizes", None)
            or [out * partition[0] // shape[0] for out in layer.outs],
            "shape": shape,
            "partition": partition,
        }


@contextmanager
def as_rank_of(
    engine: Any, tensor_parallel: int, dtype: torch.dtype, hf_config: Any
) -> Iterator[None]:
    """Let vLLM build layers as the first rank of a tensor-parallel group that does not exist.

    Args:
        engine: a default `VllmConfig`.
        tensor_parallel: size of the group.
        dtype: what the model computes in.
        hf_config: vLLM's config object of the model, None where there is none.
    """
    # Only this is read while layers are built; a real one would need a model folder.
    text = hf_config.get_text_config() if hf_config is not None else None
    model = SimpleNamespace(dtype=dtype, hf_config=hf_config, hf_text_config=text)
    object.__setattr__(engine, "model_config", model)
    with on_ranks(engine, tensor_parallel, dtype):
        yield


@contextmanager
def on_ranks(engine: Any, tensor_parallel: int, dtype: torch.dtype) -> Iterator[None]:
    """Let vLLM build what it builds on the meta device, as the first rank of no real group.

    Args:
        engine: a `VllmConfig`.
        tensor_parallel: size of the group.
        dtype: what the model computes in.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    group, alone = _group(tensor_parallel), _group(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            patch.multiple(parallel_state, _TP=group, _EP=group, _DP=alone, _PCP=alone, _PP=alone),
            set_current_vllm_config(engine),
            torch.device("meta"),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def _group(size: int) -> Any:
    """What vLLM reads off a group of ranks, for the first of them."""
    devices = SimpleNamespace(size=lambda: size, rank=lambda: 0)
    place = {"rank_in_group": 0, "is_first_rank": True, "is_last_rank": size == 1}
    return SimpleNamespace(world_size=size, device_group=devices, **place)


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


def _partition(layer: Any) -> list[int] | None:
    """[output features, input features] on one rank."""
    out = getattr(layer, "output_size_per_partition", None)
    width = getattr(layer, "input_size_per_partition", None)
    return [out, width] if out is not None and width is not None else None
