"""The full-precision stream beside the quantized one, for GPTAQ (arXiv 2504.02692).

Each layer runs once with its own weights on the hidden states of the unquantized model, and what
its Linears receive there is kept. Then it is quantized in stages (q, k and v; o; gate and up;
down): for each the quantized model's batches run once more, now behind the stages that are done,
and what a module receives has beside it what it received in the unquantized model.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from maca_llmc.calibrate.hidden_states import HiddenStates
from maca_llmc.calibrate.smoothing import smoothers
from maca_llmc.common.errors import CalibrationError
from maca_llmc.gptq.shared_inputs import Input, changed_in_place
from maca_llmc.llmcompressor_api import active_session

STAGES = 4
"""Of a layer of attention and MLP, also of one with experts."""

Stage = list[torch.nn.Module]
"""Modules that are quantized together: none of them changes the input of another."""


class FullStream:
    """Hidden states of the unquantized model, and what its modules receive in one layer.

    :param states: keeps them, beside the quantized model's, which are copied to start with
    :param batches: how many there are
    :param modifiers: that want to know
    """

    PREFIX = "full-"
    """What the keys of these hidden states begin with."""

    def __init__(self, states: HiddenStates, batches: int, modifiers: list[Any]) -> None:
        self._states = states
        self._modifiers = modifiers
        self._input_of: dict[torch.nn.Module, int] = {}
        for number in range(batches):
            states.put(f"{self.PREFIX}{number}", states.get(str(number)))

    def pass_through(
        self, layer: torch.nn.Module, outputs: Iterator[tuple[str, torch.Tensor]], capture: bool
    ) -> list[Stage]:
        """Take a layer's outputs as the next one's hidden states.

        :param outputs: key and output for each batch, computed as they are asked for
        :param capture: keep what modules with a scheme receive
        :return: these in stages, in the order they are called in; every other module in the last
        """
        self._input_of.clear()
        names = {module: name for name, module in layer.named_modules()}
        schemes = {module: getattr(module, "quantization_scheme", None) for module in names}
        # attention has a scheme without weights where the KV cache is quantized
        targets = [module for module, scheme in schemes.items() if scheme and scheme.weights]
        received: list[tuple[torch.nn.Module, Input]] = []

        def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            received.append((module, Input(args[0])))

        hooks = [module.register_forward_pre_hook(watch) for module in targets if capture]
        try:
            for number, (key, hidden) in enumerate(outputs):
                self._states.put(key, hidden)
                self._keep(number, received, names)
                received.clear()
        finally:
            for hook in hooks:
                hook.remove()
        found = stages(self._input_of, names)
        if found:
            staged = {module for stage in found for module in stage}
            found[-1] += [module for module in names if module not in staged]
        return found

    @contextmanager
    def calibrating(self, stage: Stage) -> Iterator[None]:
        """While open, modifiers see the modules of this stage only, and both of their inputs."""
        modules = set(stage)

        def input_of(module: torch.nn.Module) -> torch.Tensor | None:
            if module not in modules:
                return None
            number = active_session().state.current_batch_idx
            return self._states.get(_key(self._input_of[module], number))

        for modifier in self._modifiers:
            modifier.set_full_input(input_of)
        try:
            yield
        finally:
            for modifier in self._modifiers:
                modifier.set_full_input(None)

    def _keep(
        self,
        number: int,
        received: list[tuple[torch.nn.Module, Input]],
        names: dict[torch.nn.Module, str],
    ) -> None:
        inputs: dict[int, int] = {}  # all of them are alive: an id is an identity
        for module, given in received:
            if given.is_changed:
                raise changed_in_place(names[module])
            index = inputs.setdefault(id(given.tensor), len(inputs))
            if self._input_of.setdefault(module, index) != index:
                raise CalibrationError(
                    f"{names[module]} is not called alike in every batch (routed experts?): "
                    "set gptaq_alpha: 0"
                )
            self._states.put(_key(index, number), given.tensor)


def stages(input_of: dict[torch.nn.Module, int], names: dict[torch.nn.Module, str]) -> list[Stage]:
    """Modules in the order of their calls, together those of one input or one kind of expert.

    :param input_of: each module's input, numbered in the order of the calls
    :param names: ``mlp.experts.0.down_proj`` and ``mlp.experts.1.down_proj`` are of one kind
    """
    found: dict[str, Stage] = {}
    stage_of_input: dict[int, str] = {}
    for module, index in input_of.items():
        kind = re.sub(r"\.\d+\.", ".*.", names[module])
        stage = stage_of_input.setdefault(index, kind)
        found.setdefault(stage, []).append(module)
    return list(found.values())


def _key(index: int, number: int) -> str:
    return f"input-{index}-{number}"


def forward_passes(modifiers: list[Any]) -> int:
    """How often a layer runs: to calibrate it, and to pass its outputs on.

    It runs once more for each smoother; with the full-precision stream it runs with its own
    weights, too, and once for each stage.
    """
    return 2 + len(smoothers(modifiers)) + (STAGES if asymmetric_modifiers(modifiers) else 0)


def asymmetric_modifiers(modifiers: list[Any]) -> list[Any]:
    """Those that want the full-precision stream."""
    return [modifier for modifier in modifiers if getattr(modifier, "gptaq_alpha", 0.0) > 0]
