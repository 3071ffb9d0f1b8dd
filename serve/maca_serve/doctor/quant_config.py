"""A checkpoint's quantization_config as vLLM reads it, or why it would not."""

import copy
from types import SimpleNamespace
from typing import Any

import torch

from maca_serve.common.errors import one_line


def parse(quantization: dict[str, Any], config: dict[str, Any], model: Any) -> Any:
    """vLLM's quantization config; a new one for every layer, which may change it.

    Args:
        quantization: a `quantization_config`.
        config: the model's config.
        model: vLLM's class for the model.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models.interfaces import SupportsQuant

    method = quant_method(quantization, config)
    parsed = get_quantization_config(method).from_config(copy.deepcopy(quantization))
    configure_quant_config(parsed, model)
    if issubclass(model, SupportsQuant):
        # Such a class tells what it fuses when it is made, which needs no memory yet.
        model.__new__(model, parsed)
    return parsed


def quant_method(quantization: dict[str, Any], config: dict[str, Any]) -> str:
    """vLLM's name of the method, which may not be the one that the checkpoint says.

    Raises:
        ValueError: it knows none of that name.
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    hf_config = SimpleNamespace(**config)
    for name in ("auto_gptq", "auto_awq", "inc", "modelopt", "modelopt_fp4", "modelopt_mixed"):
        override = get_quantization_config(name).override_quantization_method(
            quantization, None, hf_config=hf_config
        )
        if override is not None:
            return str(override)
    method = str(quantization.get("quant_method"))
    if method not in QUANTIZATION_METHODS:
        raise ValueError(f"vLLM knows no quantization method {method!r}")
    return method


def refusal(quantization: Any, config: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Why vLLM would refuse the config before it builds any layer, None when it would not.

    Args:
        quantization: a `quantization_config`.
        config: the model's config.
        dtype: what the model computes in.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.platforms import current_platform

    try:
        method = quant_method(quantization, config)
        current_platform.verify_quantization(method)
        parsed = get_quantization_config(method).from_config(copy.deepcopy(quantization))
        _check_cache(quantization)
    except Exception as error:  # whatever it raises is the reason
        return one_line(error)
    capability = capability_of(current_platform)
    if capability is not None and capability < parsed.get_min_capability():
        least = parsed.get_min_capability() / 10
        return f"{method} needs compute capability {least}, the card has {capability / 10}"
    if dtype not in parsed.get_supported_act_dtypes():
        return f"{method} does not compute in {dtype}"
    return None


def _check_cache(quantization: dict[str, Any]) -> None:
    """Let vLLM refuse a scheme of the key-value cache, as it does where attention is built."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsKVCacheMethod,
    )

    if quantization.get("quant_method") == "compressed-tensors":
        CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(quantization.get("kv_cache_scheme"))


def capability_of(platform: Any) -> int | None:
    """Compute capability of vLLM's platform, 90 for 9.0; None for a CPU."""
    capability = platform.get_device_capability()
    return None if capability is None else int(capability.to_int())
