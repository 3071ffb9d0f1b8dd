"""What a model's Linears receive, found by running it without weights."""

from collections.abc import Iterable
from typing import Any

import torch

from maca_llmc.gptq.shared_inputs import Input, SharedInputs
from maca_llmc.llmcompressor_api import all_experts_on_meta

LENGTH = 64
"""Tokens of the sequence that is run."""


def distinct_inputs(shapes: Any, names: Iterable[str]) -> list[list[str]]:
    """Which modules receive the same tensor, and so need one Hessian between them.

    :param shapes: a model on the meta device, its experts separate Linears
    :param names: of the modules to look at
    :return: names of the modules of each distinct input, in the order of the forward pass
    """
    shared: SharedInputs[None] = SharedInputs(lambda _: None, lambda *_: None, lambda _: None)
    held = []  # until the end: on the meta device a tensor is known by its identity alone
    name_of = {}
    handles = []
    for name in names:
        module = shapes.get_submodule(name)
        name_of[module] = name

        def hook(module: torch.nn.Module, args: Any) -> None:
            held.append(args[0])
            shared.receive(module, Input(args[0]))

        handles.append(module.register_forward_pre_hook(hook))
    try:
        _forward(shapes, LENGTH)
    finally:
        for handle in handles:
            handle.remove()
    return [[name_of[module] for module in group.members] for group in shared.take()]


@torch.no_grad()
def _forward(shapes: Any, length: int) -> None:
    """One sequence through the decoder. Masks are given: making them would look at values."""
    with torch.device("meta"), all_experts_on_meta():
        shapes.get_decoder()(
            input_ids=torch.zeros(1, length, dtype=torch.long),
            position_ids=torch.arange(length).unsqueeze(0),
            attention_mask=torch.zeros(1, 1, length, length),
            use_cache=False,
        )
