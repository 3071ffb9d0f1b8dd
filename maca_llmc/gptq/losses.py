"""How much each module's output changes when it is quantized, in relation to the output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr

from maca_llmc.llmcompressor_api import gptq_base

LossCallback = Callable[[torch.nn.Module, float], None]

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
                callback(self.module, relative_error(loss, energies.pop(0)))

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


def active_report() -> LossCallback | None:
    """Whom to tell of a module's error, None when nobody asked."""
    return _loss_callback


def row_energies(weights: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``w H w^T`` of each row: ``[rows, d]`` weights, ``[d, d]`` Hessian."""
    weights = weights.to(hessian.dtype)
    return ((weights @ hessian) * weights).sum(dim=1)


def relative_error(loss: float, energy: float) -> float:
    """GPTQ's loss as a part of the output's energy; 0 where there is none."""
    # llm-compressor's loss is half the squared error
    return 2 * loss / energy if energy > 0 else 0.0
