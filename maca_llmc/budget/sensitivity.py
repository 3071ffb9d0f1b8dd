"""What rounding each Linear costs in the end, from one backward pass of the unquantized model.

With x a Linear's inputs and g the gradients of log p(a | x) at its outputs, answers a drawn from
the model itself, the KL divergence that an error dW of its weight costs is, to second order and
with the Fisher information taken as a Kronecker product of diagonals,

    1/2 sum_rc E[g_r^2] E[x_c^2] dW_rc^2        nats a token

each window one sample, whatever its length, and without its first token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import tqdm
from compressed_tensors.quantization import QuantizationArgs

from maca_llmc.budget.parts import Part
from maca_llmc.budget.rounding import squared_errors
from maca_llmc.llmcompressor_api import decoder_layers
from maca_llmc.tuning.recompute import recomputing
from maca_llmc.tuning.sensitivity import sampled_backward
from maca_llmc.tuning.windows import batches_of


@dataclass
class Counting:
    """What one token of the batch at hand counts, so that each window's count 1 together."""

    share: float = 0.0


class Moments:
    """Means of squares of a Linear's inputs and of the gradients of its outputs.

    :param module: the Linear
    :param counting: of the batch that goes through the model
    """

    def __init__(self, module: torch.nn.Linear, counting: Counting) -> None:
        self.inputs = torch.zeros(module.in_features)
        self.gradients = torch.zeros(module.out_features)
        self._counting = counting
        self._handle = module.register_forward_hook(self._watch)

    def _watch(self, _module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        inputs, share = args[0].detach(), self._counting.share

        def add(gradient: torch.Tensor) -> None:  # once, where the layer is run twice
            self.inputs += (_rest(inputs).float().square() * share).sum(0).cpu()
            self.gradients += (_rest(gradient).float().square() * share).sum(0).cpu()

        output.register_hook(add)

    def close(self, windows: int) -> None:
        """Stop watching, and make means of sums over so many windows."""
        self._handle.remove()
        self.inputs /= windows
        self.gradients /= windows


def _rest(values: torch.Tensor) -> torch.Tensor:
    """All tokens but the first of each window, ``[tokens, d]``; of experts, all that came."""
    return values[:, 1:].flatten(0, 1) if values.ndim == 3 else values


def watch(
    model: Any, parts: list[Part], windows: list[torch.Tensor], batch_tokens: int, seed: int
) -> dict[str, Moments]:
    """Moments of every Linear of some parts, by name.

    :param model: unquantized
    :param windows: token ids, each ``[T]``
    """
    counting = Counting()
    moments = {
        name: Moments(model.get_submodule(name), counting) for part in parts for name in part.names
    }
    generator = torch.Generator(device=model.device).manual_seed(seed)
    lengths = [len(window) for window in windows]
    with recomputing(decoder_layers(model)):
        batches = batches_of(range(len(windows)), lengths, batch_tokens)
        for batch in tqdm.tqdm(batches, desc="sensitivity", unit="batch"):
            counting.share = 1 / max(1, lengths[batch[0]] - 1)
            sampled_backward(model, torch.stack([windows[i] for i in batch]), generator)
    for watched in moments.values():
        watched.close(len(windows))
    return moments


def cost(weight: torch.Tensor, args: QuantizationArgs | None, moments: Moments) -> float:
    """Nats a token that rounding a weight costs, to second order; 0 where it stays as it is."""
    if args is None:
        return 0.0
    errors = squared_errors(weight, args, moments.inputs.to(weight.device))
    by_row = errors @ moments.inputs.to(weight.device)
    return float(moments.gradients.to(weight.device) @ by_row) / 2
