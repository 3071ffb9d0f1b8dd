"""What a resumed run must have in common with the killed one, and what it takes over from it."""

from typing import Any

import torch

from maca_llmc.common import record
from maca_llmc.llmcompressor_api import (
    GPTQModifier,
    gptq_progress,
    restore_gptq_progress,
    update_offload_parameter,
)
from maca_llmc.model import loading
from maca_llmc.modifier import MaCaModifier
from maca_llmc.recipe.reading import recipe_text
from maca_llmc.run.prepare import Run
from maca_llmc.run.state import RunState, layer_tensors, put_back


class LayerKeeper:
    """Keeps finished layers and what was measured with them in the run's state folder."""

    def __init__(self, run: Run, state: RunState) -> None:
        self._run, self._state = run, state

    @property
    def finished(self) -> int:
        """How many layers are finished already."""
        return self._state.finished

    def restore(self, index: int, layer: torch.nn.Module) -> None:
        """Make a layer what it was, and with the first one what was measured by the kill."""
        if index == 0:
            content = self._state.content
            self._run.losses.update(content["losses"])
            self._run.recorder.restore_progress(content["diagonals"])
            for modifier, progress in zip(self._run.modifiers, content["modifiers"], strict=True):
                restore_modifier_progress(modifier, progress)
        put_back(layer, self._state.load_layer(index), update_offload_parameter)

    def keep(self, layer: torch.nn.Module) -> None:
        """Write a finished layer to disk."""
        content = {
            "losses": self._run.losses,
            "diagonals": self._run.recorder.progress(),
            "modifiers": [modifier_progress(modifier) for modifier in self._run.modifiers],
        }
        self._state.save_layer(layer_tensors(layer), content)


def modifier_progress(modifier: Any) -> dict[str, Any]:
    """What MaCa or stock GPTQ knows of finished layers; others know nothing."""
    if isinstance(modifier, MaCaModifier):
        return modifier.progress()
    return gptq_progress(modifier) if isinstance(modifier, GPTQModifier) else {}


def restore_modifier_progress(modifier: Any, progress: dict[str, Any]) -> None:
    """Take over what :func:`modifier_progress` said."""
    if isinstance(modifier, MaCaModifier):
        modifier.restore_progress(progress)
    elif isinstance(modifier, GPTQModifier):
        restore_gptq_progress(modifier, progress)


def run_identity(run: Run) -> dict[str, Any]:
    """What must be the same for two runs to give the same tensors; JSON-able, flat."""
    machine, calibration = record.machine(run.device), run.calibration.record()
    return {
        "model": run.source,
        "weights": loading.weights_identity(run.source, run.config),
        "recipe": recipe_text(run.recipe),
        "--seed": calibration["seed"],
        "--lengths": calibration["scales"],
        "--balance": calibration["balance"],
        "data (--data, --tokens, ...)": calibration["sha256"],
        "--batch-tokens": run.batch_tokens,
        "--container": run.container,
        "--record-diagonals": bool(run.recorder.modules),
        "--device": str(run.device),
        "processor": machine["device"] or machine["processor"],
        "threads": machine["threads"],
        **{f"{package} version": number for package, number in record.versions().items()},
    }
