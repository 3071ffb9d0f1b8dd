"""How much an error in each channel of a layer's output costs in the end.

The diagonal of the Fisher information of a layer's output y, from one backward pass of the
unquantized model over calibration windows, with answers a drawn from the model itself:

    F_c = E[(d log p(a | x) / d y_c)^2]

To second order, an error e there costs ``sum_c F_c e_c^2 / 2`` of KL divergence to the base. First
tokens have an F of their own: they are attention sinks, with a few huge activations that matter
less than their size.
"""

from typing import Any

import torch
import tqdm

from maca_llmc.tuning.recompute import recomputing
from maca_llmc.tuning.windows import batches_of

FIRST, OTHERS = 0, 1
"""Rows of what :func:`channel_sensitivity` gives."""


def channel_sensitivity(
    model: Any,
    layers: list[torch.nn.Module],
    windows: list[torch.Tensor],
    batch_tokens: int,
    seed: int,
) -> list[torch.Tensor]:
    """F of every layer's output, scaled so that its mean over channels is 1 for other tokens.

    :param model: the unquantized model
    :param windows: token ids, each ``[T]``
    :return: by layer, float32 ``[2, d]``: of first tokens, and of all others
    """
    sums = [torch.zeros(2, model.config.get_text_config().hidden_size) for _ in layers]
    generator = torch.Generator(device=model.device).manual_seed(seed)
    handles = [
        layer.register_forward_hook(_watching(total))
        for layer, total in zip(layers, sums, strict=True)
    ]
    lengths = [len(window) for window in windows]
    try:
        with recomputing(layers):
            batches = batches_of(range(len(windows)), lengths, batch_tokens)
            for batch in tqdm.tqdm(batches, desc="sensitivity", unit="batch"):
                sampled_backward(model, torch.stack([windows[i] for i in batch]), generator)
    finally:
        for handle in handles:
            handle.remove()
    first, others = len(windows), sum(lengths) - len(windows)
    counts = torch.tensor([[first], [max(others, 1)]])
    return [_scaled(total / counts) for total in sums]


def _scaled(sensitivity: torch.Tensor) -> torch.Tensor:
    return sensitivity / sensitivity[OTHERS].mean().clamp_min(1e-30)


def _watching(total: torch.Tensor) -> Any:
    """Add the squares of the gradients of a layer's outputs to ``total``."""

    def add(gradient: torch.Tensor) -> None:
        squares = gradient.float().square()
        total[FIRST] += squares[:, 0].sum(0).cpu()
        total[OTHERS] += squares[:, 1:].sum((0, 1)).cpu()

    def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(add)

    return hook


def sampled_backward(model: Any, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Gradients of the log-probability of answers that are drawn from the model itself.

    :param ids: windows of one length, ``[windows, T]``
    """
    embedded = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    logs = logits.log_softmax(-1).flatten(0, 1)
    (-logs.gather(1, drawn).sum()).backward()
