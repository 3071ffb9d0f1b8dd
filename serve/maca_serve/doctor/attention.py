"""Whether vLLM's attention can run heads of the model's size."""

from typing import Any

import torch

from maca_serve.common.errors import one_line

Answer = dict[str, Any]


def ask_attention(hf_config: Any, dtype: torch.dtype) -> Answer:
    """Ask the backend that vLLM would take on this platform for a decoder's self-attention.

    A CPU's platform takes its only backend without asking it, and the engine dies of heads that
    it has no code for at the first request. So the backend is asked here.

    Args:
        hf_config: vLLM's config object of the model.
        dtype: what the model computes in.

    Returns:
        `backend`, its name or null; `head_size`; `sizes` that it has, empty where it has all or
        does not say; and `refused`, why it would not run them, or null.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.selector import get_attn_backend

    head_size = _head_size(hf_config)
    engine = VllmConfig()
    cache = engine.cache_config.cache_dtype
    try:
        with set_current_vllm_config(engine):
            backend = get_attn_backend(head_size, dtype, cache)
    except Exception as error:  # whatever vLLM raises, it would raise in the engine
        refused = one_line(error)
        return {"backend": None, "head_size": head_size, "sizes": [], "refused": refused}
    reasons = backend.validate_configuration(
        head_size=head_size,
        dtype=dtype,
        kv_cache_dtype=cache,
        block_size=None,
        use_mla=False,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type=AttentionType.DECODER,
    )
    return {
        "backend": backend.get_name(),
        "head_size": head_size,
        "sizes": list(backend.get_supported_head_sizes()),
        "refused": ", ".join(reasons) or None,
    }


def _head_size(hf_config: Any) -> int:
    """Head size as vLLM takes it from the config."""
    from vllm.transformers_utils.config import get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    kind = MODEL_ARCH_CONFIG_CONVERTORS.get(hf_config.model_type, ModelArchConfigConvertorBase)
    return int(kind(hf_config, get_hf_text_config(hf_config)).get_head_size())
