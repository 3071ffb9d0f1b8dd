"""Tune where the weights of one decoder layer are rounded, and by which scale.

A layer of the quantized model is to answer as its counterpart does in the unquantized one, each on
what its own predecessor puts out. With activations y of the unquantized layer, windows i of
lengths L_i and token weights as in the Hessian (see ``token_weights``):

    loss = sum_i sum_t w_it |y_it - y'_it|^2 / sum_i sum_t w_it |y_it|^2
"""

import random
from dataclasses import dataclass
from typing import Any

import torch

from maca_llmc.calibrate.hidden_states import HiddenStates
from maca_llmc.calibrate.pipeline import Call, move
from maca_llmc.gptq.token_weights import sequence_segments
from maca_llmc.tuning.options import BlockOptions
from maca_llmc.tuning.rounding import RoundedWeight
from maca_llmc.tuning.windows import Batch, batches_of, steps


@dataclass(frozen=True)
class LayerResult:
    """What tuning did to one layer.

    :param before: loss on held-out windows; so ``after``, which is never above it
    :param changed: share of codes that are others now
    """

    before: float
    after: float
    changed: float


@dataclass
class Stream:
    """Hidden states of all windows in front of a layer, and what the layer is called with besides.

    :param calls: by window and layer
    :param device: to compute on
    :param dtype: to compute in
    """

    calls: list[list[Call]]
    hidden: HiddenStates
    device: torch.device
    dtype: torch.dtype

    def output(self, layer: torch.nn.Module, index: int, batch: Batch) -> torch.Tensor:
        """``[windows, T, d]`` of a layer for windows of one length."""
        args, kwargs = move(self.calls[batch[0]][index], self.device)
        args, kwargs = _in_dtype((args, kwargs), self.dtype)
        rows = torch.cat([self.hidden.get(str(number)) for number in batch])
        output = layer(rows.to(self.device, self.dtype), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: torch.nn.Module, index: int, batches: list[Batch]) -> None:
        """Replace the hidden states by the layer's outputs."""
        with torch.no_grad():
            for batch in batches:
                for number, row in zip(batch, self.output(layer, index, batch), strict=True):
                    self.hidden.put(str(number), row.unsqueeze(0).to(torch.bfloat16))


def _in_dtype(values: Any, dtype: torch.dtype) -> Any:
    def convert(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return torch.utils._pytree.tree_map(convert, values)


class BlockLoss:
    """The loss of a layer's outputs, each token with its weight.

    :param lengths: tokens of every window
    :param options: exponent and first token's weight
    :param sensitivity: of the layer's channels, see ``sensitivity.py``
    """

    def __init__(
        self, lengths: list[int], options: BlockOptions, sensitivity: torch.Tensor
    ) -> None:
        self._weights = {length: token_weights(length, options) for length in set(lengths)}
        self._first, self._others = sensitivity

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Weighted squared error, summed; both ``[windows, T, d]``."""
        weights = self._weights[output.shape[1]].to(output.device)
        squares = (output.float() - target.float()).square()
        first = (squares[:, 0] @ self._first.to(output.device)) * weights[0]
        return first.sum() + ((squares[:, 1:] @ self._others.to(output.device)) * weights[1:]).sum()

    def size(self, target: torch.Tensor) -> float:
        """The same of the target itself."""
        return float(self(torch.zeros_like(target), target))


def token_weights(length: int, options: BlockOptions) -> torch.Tensor:
    """Weight of each token of a window, ``[length]``."""
    weights = torch.empty(length)
    segments = sequence_segments(length, options.length_exponent, first=options.first_token_weight)
    for segment in segments:
        weights[segment.start : segment.stop] = segment.weight
    return weights


@dataclass
class LayerTuner:
    """Learns the codes and scales of one layer.

    :param layer: in ``quantized.dtype``
    :param index: of it, from 0
    :param modules: its quantized Linears by name; so ``rounded``, their weights
    :param quantized: what goes into it
    :param targets: by window, what the unquantized layer puts out ``[1, T, d]``
    :param lengths: tokens of every window
    """

    layer: torch.nn.Module
    index: int
    modules: dict[str, torch.nn.Module]
    rounded: dict[str, RoundedWeight]
    quantized: Stream
    targets: HiddenStates
    lengths: list[int]
    options: BlockOptions
    sensitivity: torch.Tensor

    def tune(self, train: list[int], held: list[int], seed: int) -> LayerResult:
        """Take the steps; ``rounded`` and the layer are left at what was best on ``held``."""
        loss = BlockLoss(self.lengths, self.options, self.sensitivity)
        held_batches = batches_of(held, self.lengths, self.options.batch_tokens)
        size = sum(loss.size(self._target(batch)) for batch in held_batches)
        self._put()
        start = best = self._error(loss, held_batches) / size
        kept = {name: weight.state() for name, weight in self.rounded.items()}
        generator = random.Random(f"{seed} {self.index}")
        draw = steps(train, self.lengths, self.options.step_tokens, generator)
        for step in range(self.options.steps):
            self._step(loss, next(draw), size, decay=1 - step / self.options.steps)
            if (step + 1) % self.options.check_every == 0 or step + 1 == self.options.steps:
                now = self._error(loss, held_batches) / size
                if now < best:
                    best, kept = now, {n: weight.state() for n, weight in self.rounded.items()}
        for name, weight in self.rounded.items():
            weight.restore(kept[name])
        self._put()
        return LayerResult(start, best, self._changed())

    def _step(self, loss: BlockLoss, batches: list[Batch], size: float, decay: float) -> None:
        for batch in batches:
            error = loss(self.quantized.output(self.layer, self.index, batch), self._target(batch))
            (error / size).backward()
        for name, weight in self.rounded.items():
            module: Any = self.modules[name]
            if module.weight.grad is not None:  # an expert that no token was routed to has none
                weight.step(
                    module.weight.grad, self.options.rate * decay, self.options.scale_rate * decay
                )
            module.weight.grad = None
        self._put()

    def _target(self, batch: Batch) -> torch.Tensor:
        rows = torch.cat([self.targets.get(str(number)) for number in batch])
        return rows.to(self.quantized.device)

    @torch.no_grad()
    def _error(self, loss: BlockLoss, batches: list[Batch]) -> float:
        return sum(
            float(loss(self.quantized.output(self.layer, self.index, batch), self._target(batch)))
            for batch in batches
        )

    @torch.no_grad()
    def _put(self) -> None:
        """Give the layer its weights as they are now."""
        for name, weight in self.rounded.items():
            module: Any = self.modules[name]
            module.weight.copy_(weight.weight())

    def _changed(self) -> float:
        changed = sum(int((w.result().codes != w.start.codes).sum()) for w in self.rounded.values())
        return changed / max(1, sum(w.start.codes.numel() for w in self.rounded.values()))
