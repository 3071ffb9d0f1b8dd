"""The one file that touches what llm-compressor keeps to itself.

``tests/maca_llmc/test_llmcompressor_api.py`` holds each of these to the pinned release, so that
an upgrade that moves something fails there and says what moved.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, set_onload_device
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import calculate_range
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
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential import SequentialPipeline
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline
from llmcompressor.recipe import Recipe
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
from transformers.monkey_patching import clear_patch_mapping

from maca_llmc.solve import BlockUpdate, Factor, sweep
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
    "all_experts_on_meta",
    "broadcast_quantized",
    "calibration_forward",
    "computing_on",
    "decoder_layers",
    "disable_offloading",
    "empty_hessian",
    "forget_causal_masks",
    "gptq_progress",
    "keep_causal_masks",
    "loading_separate_experts",
    "onload_device",
    "quantize_stacks",
    "recorded_losses",
    "restore_gptq_progress",
    "row_stacks",
    "separate_experts",
    "solve_batches",
    "update_offload_parameter",
]

LossCallback = Callable[[torch.nn.Module, float], None]

QuantizedModule = Any
"""A module that llm-compressor gave a ``quantization_scheme`` and a ``weight_observer``."""


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


_loss_callback: LossCallback | None = None


@contextmanager
def recorded_losses(callback: LossCallback) -> Iterator[None]:
    """While open, report each module that GPTQ or MaCa quantizes and its relative output error.

    The error is ``tr(D (H + dI) D^T) / tr(W H W^T)`` with ``D`` the change of the weight ``W``,
    ``H`` the Hessian GPTQ was given and ``d`` its dampening: a number without units, comparable
    between weightings of H. For a module that stock GPTQ had to round to nearest, because its H
    could not be factorised, the identity stands above the line instead of ``H + dI``.

    :param callback: called with the module and its error
    """
    global _loss_callback
    energies: list[float] = []

    def quantize_weight(*, weights: Any, hessians: Any, **kwargs: Any) -> Any:
        energies[:] = [
            float(row_energies(weight, hessian).sum())
            for weight, hessian in zip(weights, hessians, strict=True)
        ]
        return original(weights=weights, hessians=hessians, **kwargs)

    class RecordingLogger(gptq_base.CompressionLogger):
        def set_results(self, name: str | None = None, loss: float | None = None) -> None:
            super().set_results(name=name, loss=loss)
            if loss is not None:
                callback(self.module, _relative(loss, energies.pop(0)))

    original = gptq_base.quantize_weight
    before, _loss_callback = _loss_callback, callback
    try:
        with (
            patch_attr(gptq_base, "quantize_weight", quantize_weight),
            patch_attr(gptq_base, "CompressionLogger", RecordingLogger),
        ):
            yield
    finally:
        _loss_callback = before


ROWS_PER_STACK = 32768
"""Rows swept at once: what bounds the memory of a solve for hundreds of experts."""

BY_ROW = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
"""Strategies whose scales belong to rows, so that rows of several modules can be stacked."""


def row_stacks(modules: list[QuantizedModule]) -> list[list[QuantizedModule]]:
    """Split modules of one input into stacks whose rows one sweep can quantize.

    Together go modules of the same quantization arguments, dtype and device, where scales belong
    to rows; any other module stays by itself.
    """
    stacks: list[list[QuantizedModule]] = []
    open_stacks: dict[Any, list[QuantizedModule]] = {}
    for module in modules:
        key = batch_key(module)
        if key is None or module.quantization_scheme.weights.strategy not in BY_ROW:
            stacks.append([module])
            continue
        shape, *alike = key
        like = (shape[1], *alike)
        stack = open_stacks.get(like)
        if stack is None or sum(len(m.weight) for m in stack) + shape[0] > ROWS_PER_STACK:
            stack = open_stacks[like] = []
            stacks.append(stack)
        stack.append(module)
    return stacks


def solve_batches(
    modules: list[QuantizedModule], batched: str | int | None, block_size: int
) -> list[list[QuantizedModule]]:
    """Modules of different inputs that llm-compressor would solve side by side."""
    return assign_batches(modules, batched, block_size)


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


@torch.no_grad()
def quantize_stacks(
    stacks: list[list[QuantizedModule]],
    factors: list[Factor],
    hessians: list[torch.Tensor],
    block_size: int,
) -> None:
    """Quantize stacks of modules side by side, each stack with a Hessian of its own.

    The codes are those that llm-compressor's ``quantize_weight`` gives each module alone.

    :param stacks: as :func:`row_stacks` makes them, all of one shape
    :param factors: of each stack's Hessian
    :param hessians: float32 ``[d, d]``, one a stack, to relate losses to
    """
    with disable_offloading():
        args = stacks[0][0].quantization_scheme.weights
        modules = [module for stack in stacks for module in stack]
        qparams = {module: module.weight_observer.get_qparams() for module in modules}
        weights = _stacked(stacks, lambda module: module.weight.float())
        update = _block_update(stacks, qparams, args, factors)
        report = _loss_callback
        if report is not None:
            energies = torch.stack(
                [row_energies(w, hessian) for w, hessian in zip(weights, hessians, strict=True)]
            )
        quantized, losses = sweep(weights, factors, update, block_size)
        rows = [len(module.weight) for module in stacks[0]]
        # by module and not stacked as stock's, which are only ever indexed
        parts: Any = [part for stacked in quantized for part in stacked.split(rows)]
        scales: Any = [qparams[module]["scale"] for module in modules]
        zero_points: Any = [qparams[module]["zero_point"] for module in modules]
        global_scales: Any = _global_scales(modules, qparams)
        update_batch_qparams(modules, parts, scales, zero_points, global_scales, args)
    if report is not None:
        sums = zip(modules, _sums(losses, rows), _sums(energies, rows), strict=True)
        for module, loss, energy in sums:
            report(module, _relative(loss, energy))


def broadcast_quantized(rank_of: dict[torch.nn.Module, int]) -> None:
    """Send quantized modules from the ranks that quantized them to all others."""
    broadcast_qparams_and_cleanup(list(rank_of), rank_of, gptq_base._GPTQ_Q_PARAMS)


def row_energies(weights: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``w H w^T`` of each row: ``[rows, d]`` weights, ``[d, d]`` Hessian."""
    weights = weights.to(hessian.dtype)
    return ((weights @ hessian) * weights).sum(dim=1)


def _relative(loss: float, energy: float) -> float:
    # llm-compressor's loss is half the squared error
    return 2 * loss / energy if energy > 0 else 0.0


def _sums(values: torch.Tensor, rows: list[int]) -> list[float]:
    return [float(part.sum()) for stacked in values for part in stacked.split(rows)]


def _stacked(stacks: Any, of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.cat([of(module) for module in stack]) for stack in stacks])


def _global_scales(modules: Any, qparams: Any) -> list[torch.Tensor] | None:
    if qparams[modules[0]]["global_scale"] is None:
        return None
    return [qparams[module]["global_scale"].reshape(-1)[0] for module in modules]


def _block_update(stacks: Any, qparams: Any, args: Any, factors: list[Factor]) -> BlockUpdate:
    """llm-compressor's block update, given everything but the block."""
    global_scales = _global_scales([stack[0] for stack in stacks], qparams)
    return partial(
        gptq_block_update,
        scale=_per_stack(stacks, lambda module: qparams[module]["scale"]),
        zero_point=_per_stack(stacks, lambda module: qparams[module]["zero_point"]),
        global_scale=None if global_scales is None else torch.stack(global_scales),
        g_idx=_column_groups(args, factors),
        quant_args=args,
    )


def _per_stack(stacks: Any, of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """As ``_stacked``, but a stack of one may have a scale that is no matrix."""
    return torch.stack(
        [of(stack[0]) if len(stack) == 1 else torch.cat([of(m) for m in stack]) for stack in stacks]
    )


def _column_groups(args: Any, factors: list[Factor]) -> torch.Tensor | None:
    """Which scale each column has, in the order of the sweep; None where columns share one."""
    if args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        size = args.group_size
    elif args.strategy == QuantizationStrategy.BLOCK:
        size = args.block_structure[1]
    else:
        return None
    upper = factors[0].upper
    groups = torch.arange(upper.shape[0], device=upper.device, dtype=torch.int) // size
    if args.actorder == ActivationOrdering.WEIGHT:
        return torch.stack([groups[factor.order] for factor in factors])
    return groups


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
