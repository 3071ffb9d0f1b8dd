"""The one file that touches what llm-compressor keeps to itself.

``tests/maca_llmc/test_llmcompressor_api.py`` holds each of these to the pinned release, so that
an upgrade that moves something fails there and says what moved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from compressed_tensors.utils import get_execution_device, match_named_modules, patch_attr
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.gptq.helpers import make_empty_hessian
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline
from llmcompressor.recipe import Recipe
from llmcompressor.utils.pytorch.module import infer_sequential_targets

__all__ = [
    "GPTQModifier",
    "ModifierFactory",
    "QuantizationMixin",
    "Recipe",
    "computing_on",
    "decoder_layers",
    "empty_hessian",
    "forget_causal_masks",
    "is_source_process",
    "keep_causal_masks",
    "recorded_losses",
]

LossCallback = Callable[[torch.nn.Module, float], None]


def empty_hessian(module: torch.nn.Module) -> torch.Tensor:
    """A zero float32 ``[d, d]`` Hessian on the device ``module`` computes on."""
    return make_empty_hessian(module, device=get_execution_device(module))


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that the sequential pipeline will run one by one."""
    targets = infer_sequential_targets(model, None)
    return [module for _, module in match_named_modules(model, targets)]


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


@contextmanager
def recorded_losses(callback: LossCallback) -> Iterator[None]:
    """While open, report each module that GPTQ quantizes and its relative output error.

    The error is ``tr(D H D^T) / tr(W H W^T)`` with ``D`` the change of the weight ``W`` and ``H``
    the Hessian GPTQ was given: a number without units, comparable between weightings of H.

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


def output_energy(weights: torch.Tensor, hessians: torch.Tensor) -> list[float]:
    """``tr(W H W^T)`` of each of a stack: ``[b, rows, d]`` weights, ``[b, d, d]`` Hessians."""
    weights = weights.to(hessians.dtype)
    return [
        float(((weight @ hessian) * weight).sum())
        for weight, hessian in zip(weights, hessians, strict=True)
    ]
