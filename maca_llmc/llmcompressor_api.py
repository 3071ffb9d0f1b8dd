"""The one file that touches what llm-compressor keeps to itself.

``tests/maca_llmc/test_llmcompressor_api.py`` holds each of these to the pinned release, so that
an upgrade that moves something fails there and says what moved.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, set_onload_device
from compressed_tensors.utils import (
    get_execution_device,
    match_named_modules,
    patch_attr,
    update_offload_parameter,
)
from compressed_tensors.utils.impl_backend import ImplBackend
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.moe.conversion_mappings import has_linearize_load_mappings
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes, load_quantizable_moe
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.gptq.gptq_quantize import gptq_block_update
from llmcompressor.modifiers.gptq.helpers import (
    assign_batches,
    batch_key,
    column_scale_window,
    make_empty_hessian,
    update_batch_qparams,
)
from llmcompressor.modifiers.quantization.calibration import (
    initialize_observer,
    observe,
    update_qparams,
)
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.observers import Observer
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential import SequentialPipeline
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline
from llmcompressor.recipe import Recipe
from llmcompressor.sentinel import Sentinel
from llmcompressor.utils.dist import broadcast_qparams_and_cleanup
from llmcompressor.utils.helpers import (
    DisableQuantization,
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.monkey_patching import clear_patch_mapping

from maca_llmc.common.errors import UserError

__all__ = [
    "CalibrationPipeline",
    "GPTQModifier",
    "HooksMixin",
    "ImplBackend",
    "LifecycleCallbacks",
    "ModifierFactory",
    "QuantizationMixin",
    "Recipe",
    "Sentinel",
    "SequentialPipeline",
    "active_session",
    "all_experts_on_meta",
    "assign_batches",
    "batch_key",
    "broadcast_quantized",
    "calibration_forward",
    "column_scale_window",
    "computing_on",
    "decoder_layers",
    "disable_offloading",
    "empty_hessian",
    "forget_causal_masks",
    "gptq_base",
    "gptq_block_update",
    "gptq_progress",
    "initialize_observer",
    "keep_causal_masks",
    "keep_expert_names",
    "loading_separate_experts",
    "observe",
    "observer_names",
    "onload_device",
    "patch_attr",
    "restore_gptq_progress",
    "separate_experts",
    "update_batch_qparams",
    "update_offload_parameter",
    "update_qparams",
]


SEPARATE_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight")
SEPARATE_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""What llm-compressor calls the parts of what transformers makes one tensor of."""


def empty_hessian(module: torch.nn.Module) -> torch.Tensor:
    """A zero float32 ``[d, d]`` Hessian on the device ``module`` computes on."""
    return make_empty_hessian(module, device=get_execution_device(module))


def observer_names() -> list[str]:
    """What a recipe may name as an observer, as recipes spell it."""
    known = {*Observer.registered_names(), *Observer.registered_aliases()}
    return sorted(name.replace("-", "_") for name in known)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that calibration will run one by one, on text.

    The layers of a vision tower count as targets too and are never called by text.
    """
    targets = infer_sequential_targets(model, None)
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[operator]
    return [module for _, module in match_named_modules(decoder, targets)]


def separate_experts(model: Any) -> Any:
    """Give a model without weights (meta device) its experts as the Linears they are loaded as.

    llm-compressor's own ``linearize_moe`` copies weights and offloads them, which meta cannot.

    :raises UserError: when it does not know their sizes
    """
    for name, experts in get_non_linearized_moes(model):
        model.set_submodule(name, _separated(experts, model.config))
    return model


def _separated(experts: Any, config: Any) -> Any:
    fused: Any = type(experts)
    made: Any = LinearExperts2D.get_linear_experts_cls(fused)
    separate: Any
    try:
        if made is Llama4LinearExperts:
            sizes = (experts.num_experts, experts.hidden_size, experts.expert_dim)
            separate = made(*sizes, config.get_text_config())
        else:
            separate = made(getattr(experts, "config", config))
    except TypeError:
        separate = None  # sizes by layer, in a list (HunYuan)
    wanted = sorted(experts.down_proj.shape)
    if separate is None or wanted != sorted(
        (separate.num_experts, *separate[0].down_proj.weight.shape)
    ):
        raise UserError(
            f"llm-compressor does not know the sizes of {fused.__name__} (together "
            f"{' x '.join(map(str, experts.down_proj.shape))}), and cannot separate the experts: "
            "take another model"
        )
    return separate


@contextmanager
def all_experts_on_meta() -> Iterator[None]:
    """While open, every token goes to every expert, as in calibration, also without values."""
    with (
        moe_calibration_context(),
        patch_attr(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True),
    ):
        yield


@contextmanager
def loading_separate_experts(model_class: Any, model_type: str) -> Iterator[None]:
    """While open, have ``model_class.from_pretrained`` load experts as separate Linears.

    For that, llm-compressor has transformers list all of its modules, some of which cannot be
    listed without torchvision: they are shown as empty. And it leaves transformers' mapping of
    checkpoint names changed, with which any later plain load of such a model would get experts
    of random numbers: the mapping is put back. The model loaded here keeps its own for saving.
    """
    mappings = _conversion_mappings()
    before = dict(mappings)
    with ExitStack() as stack:
        if has_linearize_load_mappings(model_type):
            for module in _unlistable_modules():
                stack.enter_context(patch_attr(module, "__dir__", lambda: []))
        if model_type == "llama4_text":  # which llm-compressor knows as a part only
            own = property(lambda config: config)
            stack.enter_context(patch_attr(Llama4TextConfig, "text_config", own))
        stack.enter_context(load_quantizable_moe(model_class))
        try:
            yield
        finally:
            clear_patch_mapping()
            mappings.clear()
            mappings.update(before)


def keep_expert_names(model: Any) -> None:
    """Have a loaded model's separate experts saved under the names that its checkpoint has them by.

    Where transformers fuses them (``w1`` and ``w3`` of LFM2-MoE to ``gate_up_proj``), its way back
    is for fused experts only, and separate ones would keep llm-compressor's names.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    for conversion in [one for one in conversions if isinstance(one, WeightConverter)]:
        fused = conversion.target_patterns[0].rpartition(".")[2]
        parts = [SEPARATE_EXPERT.search(source) for source in conversion._original_source_patterns]
        for part, ours in zip(parts, SEPARATE_NAMES.get(fused, ()), strict=False):
            if part is not None and part[1] != ours:
                renaming = WeightRenaming(
                    rf"\.experts\.(\d+)\.{part[1]}\.", rf".experts.\1.{ours}."
                )
                renaming.scope_prefix = conversion.scope_prefix
                conversions.append(renaming)


def _conversion_mappings() -> dict[str, Any]:
    conversion_mapping.get_checkpoint_conversion_mapping("")  # fills the table on first use
    mappings: Any = conversion_mapping._checkpoint_conversion_mapping_cache
    return mappings


def _unlistable_modules() -> list[ModuleType]:
    unlistable = []
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers."):
            try:
                dir(module)
            except ImportError:
                unlistable.append(module)
    return unlistable


def keep_causal_masks(config: Any) -> None:
    """Have the sequential pipeline build attention masks also where it traces their creation.

    Models that choose their mask function at run time (Qwen3-MoE) have the call traced, with a
    configuration rebuilt from ``config.to_dict()``. That leaves the kind of attention out, without
    which transformers makes no mask: calibration would run without causality and without padding.
    As a plain attribute it survives the round trip. Undo with ``forget_causal_masks``.
    """
    for part in (config, config.get_text_config()):
        part.attn_implementation = "eager"  # what the sequential pipeline forces


def forget_causal_masks(config: Any) -> None:
    """Undo ``keep_causal_masks``, so that it does not end up in a saved configuration."""
    for part in (config, config.get_text_config()):
        part.__dict__.pop("attn_implementation", None)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """While open, have either pipeline load layers to ``device``.

    llm-compressor itself takes the first accelerator it sees, whatever the user asked for, and
    AWQ pins memory, which a machine without one cannot.
    """
    with ExitStack() as stack:
        stack.enter_context(patch_attr(sequential_pipeline, "get_main_device", lambda: device))
        if device.type == "cpu":
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda *_: None))
        yield


def onload_device(model: torch.nn.Module) -> torch.device:
    """Where to compute; from here on ``model``'s layers are loaded there when they are used."""
    device = sequential_pipeline.get_main_device()
    set_onload_device(model, device)
    return device


@contextmanager
def calibration_forward(model: torch.nn.Module) -> Iterator[None]:
    """As llm-compressor's ``calibration_forward_context``, but with the model's own attention."""
    with (
        torch.no_grad(),
        disable_cache(model),
        eval_context(model),
        disable_hf_kernels(model),
        disable_lm_head(model),
        DisableQuantization(model),
    ):
        yield


def gptq_progress(modifier: Any) -> dict[str, Any]:
    """What GPTQ will say at its end of the modules it has quantized so far; JSON-able."""
    return {
        "compressed": modifier._num_compressed_modules,
        "rounded_to_nearest": list(modifier._rtn_fallback_module_names),
    }


def restore_gptq_progress(modifier: Any, progress: dict[str, Any]) -> None:
    """Undo the difference between a new modifier and one that quantized some layers."""
    modifier._num_compressed_modules = progress["compressed"]
    modifier._rtn_fallback_module_names = list(progress["rounded_to_nearest"])


def broadcast_quantized(rank_of: dict[torch.nn.Module, int]) -> None:
    """Send quantized modules from the ranks that quantized them to all others."""
    broadcast_qparams_and_cleanup(list(rank_of), rank_of, gptq_base._GPTQ_Q_PARAMS)
