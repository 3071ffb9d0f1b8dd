"""The one file that touches what llm-compressor keeps to itself.

``tests/maca_llmc/test_llmcompressor_api.py`` holds each of these to the pinned release, so that
an upgrade that moves something fails there and says what moved.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, set_onload_device
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_range
from compressed_tensors.utils import get_execution_device, match_named_modules, patch_attr
from compressed_tensors.utils.impl_backend import ImplBackend
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modeling.moe.conversion_mappings import has_linearize_load_mappings
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes, load_quantizable_moe
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.gptq.helpers import column_scale_window, make_empty_hessian
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential import SequentialPipeline
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline
from llmcompressor.recipe import Recipe
from llmcompressor.utils.helpers import (
    DisableQuantization,
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from transformers import conversion_mapping
from transformers.monkey_patching import clear_patch_mapping

from maca_llmc.sweep import sweep_block

__all__ = [
    "CalibrationPipeline",
    "GPTQModifier",
    "HooksMixin",
    "LifecycleCallbacks",
    "ModifierFactory",
    "QuantizationMixin",
    "Recipe",
    "SequentialPipeline",
    "active_session",
    "calibration_forward",
    "computing_on",
    "decoder_layers",
    "disable_offloading",
    "empty_hessian",
    "forget_causal_masks",
    "keep_causal_masks",
    "loading_separate_experts",
    "onload_device",
    "recorded_losses",
    "separate_experts",
]

LossCallback = Callable[[torch.nn.Module, float], None]


def empty_hessian(module: torch.nn.Module) -> torch.Tensor:
    """A zero float32 ``[d, d]`` Hessian on the device ``module`` computes on."""
    return make_empty_hessian(module, device=get_execution_device(module))


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that the sequential pipeline will run one by one, on text.

    The layers of a vision tower count as targets too and are never called by text.
    """
    targets = infer_sequential_targets(model, None)
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[operator]
    return [module for _, module in match_named_modules(decoder, targets)]


def separate_experts(model: Any) -> Any:
    """Give a model without weights (meta device) its experts as the Linears they are loaded as.

    llm-compressor's own ``linearize_moe`` copies weights and offloads them, which meta cannot.
    """
    for name, experts in get_non_linearized_moes(model):
        fused: Any = type(experts)
        separate = LinearExperts2D.get_linear_experts_cls(fused)
        model.set_submodule(name, separate(getattr(experts, "config", model.config)))
    return model


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
        stack.enter_context(load_quantizable_moe(model_class))
        try:
            yield
        finally:
            clear_patch_mapping()
            mappings.clear()
            mappings.update(before)


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
        part.attn_implementation = "eager"  # what llm-compressor forces in calibration


def forget_causal_masks(config: Any) -> None:
    """Undo ``keep_causal_masks``, so that it does not end up in a saved configuration."""
    for part in (config, config.get_text_config()):
        part.__dict__.pop("attn_implementation", None)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """While open, have the sequential pipeline load layers to ``device``.

    llm-compressor itself takes the first accelerator it sees, whatever the user asked for.
    """
    with patch_attr(sequential_pipeline, "get_main_device", lambda: device):
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


@contextmanager
def recorded_losses(callback: LossCallback) -> Iterator[None]:
    """While open, report each module that GPTQ quantizes and its relative output error.

    The error is ``tr(D (H + dI) D^T) / tr(W H W^T)`` with ``D`` the change of the weight ``W``,
    ``H`` the Hessian GPTQ was given and ``d`` its dampening: a number without units, comparable
    between weightings of H. For a module that had to be rounded to nearest, because its H could
    not be factorised, the identity stands above the line instead of ``H + dI``.

    :param callback: called with the module and its error
    """
    energies: list[float] = []

    def quantize_weight(*, weights: Any, hessians: Any, **kwargs: Any) -> Any:
        energies[:] = output_energy(weights, hessians)
        return original(weights=weights, hessians=hessians, **kwargs)

    class RecordingLogger(gptq_base.CompressionLogger):
        def set_results(self, name: str | None = None, loss: float | None = None) -> None:
            super().set_results(name=name, loss=loss)
            if loss is not None:
                energy = energies.pop(0)
                # llm-compressor's loss is half the squared error
                callback(self.module, 2 * loss / energy if energy > 0 else 0.0)

    original = gptq_base.quantize_weight
    with (
        patch_attr(gptq_base, "quantize_weight", quantize_weight),
        patch_attr(gptq_base, "CompressionLogger", RecordingLogger),
    ):
        yield


def _compiled_sweep_runs(W1: torch.Tensor, *_: Any, scale: Any, quant_args: Any, **__: Any) -> bool:
    return (
        W1.device.type == "cpu"
        and W1.dtype == torch.float32
        and scale.dtype in (torch.float32, torch.bfloat16)
        and quant_args.type == QuantizationType.INT
    )


@ImplBackend.register("gptq_block_update", _compiled_sweep_runs, 1)
def _gptq_block_update_compiled(
    W1: torch.Tensor,
    Hinv1: torch.Tensor,
    Q1: torch.Tensor,
    Err1: torch.Tensor,
    losses1: torch.Tensor,
    *,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    quant_args: QuantizationArgs,
    i1: int,
) -> None:
    """llm-compressor's ``gptq_block_update`` on the CPU; same arguments, same codes."""
    rows, width = W1.shape[-2:]
    step, zero = column_scale_window(
        scale, zero_point, global_scale, g_idx, quant_args, num_rows=rows, i1=i1, i2=i1 + width
    )
    low, high = calculate_range(quant_args, W1.device)
    for index in range(W1.shape[0]):
        sweep_block(
            W1[index],
            Hinv1[index],
            step.expand(W1.shape)[index],
            None if zero is None else zero.expand(W1.shape)[index],
            (float(low), float(high)),
            Q1[index],
            Err1[index],
        )
    losses1.copy_(Err1.square())


def output_energy(weights: torch.Tensor, hessians: torch.Tensor) -> list[float]:
    """``tr(W H W^T)`` of each of a stack: ``[b, rows, d]`` weights, ``[b, d, d]`` Hessians."""
    weights = weights.to(hessians.dtype)
    return [
        float(((weight @ hessian) * weight).sum())
        for weight, hessian in zip(weights, hessians, strict=True)
    ]
