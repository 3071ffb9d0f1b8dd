"""Keep what a tuning run has finished, and take it up again: layers, then the end-to-end stage."""

from dataclasses import asdict

import torch

from maca_llmc.run.state import RunState
from maca_llmc.tuning.end_to_end import Progress
from maca_llmc.tuning.integers import IntegerWeight
from maca_llmc.tuning.layer import LayerResult


class LayerKeeper:
    """Keeps tuned layers in a run's state folder.

    :param start: the weights before tuning: zero points are taken from there
    """

    def __init__(self, state: RunState, start: dict[str, IntegerWeight]) -> None:
        self._state, self._start = state, start

    def restored(self, index: int) -> tuple[dict[str, IntegerWeight], LayerResult] | None:
        """A layer that a killed run had finished; None for one that it had not."""
        if index >= self._state.finished:
            return None
        tensors = self._state.load_layer(index)
        names = {key.rpartition(".")[0] for key in tensors}
        weights = {
            name: IntegerWeight(
                tensors[f"{name}.codes"], tensors[f"{name}.scale"], self._start[name].zero_point
            )
            for name in names
        }
        return weights, LayerResult(**self._state.content["layers"][index])

    def keep(self, weights: dict[str, IntegerWeight], result: LayerResult) -> None:
        """Keep the next layer."""
        tensors = {f"{name}.codes": weight.codes for name, weight in weights.items()}
        tensors |= {f"{name}.scale": weight.scale for name, weight in weights.items()}
        layers = [*self._state.content.get("layers", []), asdict(result)]
        self._state.save_layer(tensors, {"layers": layers})


def save_progress(state: RunState, layers: int, progress: Progress) -> None:
    """Keep where the end-to-end stage stands, in place of where it stood.

    :param layers: finished by the stage before it
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, factor in progress.factors.items():
        first, second = progress.moments[name]
        parts = {"factor": factor, "best": progress.best[name], "first": first, "second": second}
        tensors |= {f"{name}.{part}": tensor.cpu().clone() for part, tensor in parts.items()}
    history = [sorted(looked.items()) for looked in progress.history]
    content = {"layers": state.content.get("layers", []), "steps": progress.steps}
    state.save_layer(tensors, {**content, "history": history})
    for index in range(layers, state.finished - 1):
        state.drop_layer(index)


def load_progress(state: RunState, layers: int) -> Progress | None:
    """Where the end-to-end stage of a killed run stood; None where it had not begun."""
    if state.finished <= layers:
        return None
    progress = Progress(
        steps=state.content["steps"],
        history=[{int(n): kl for n, kl in looked} for looked in state.content["history"]],
    )
    for key, tensor in state.load_layer(state.finished - 1).items():
        name, _, part = key.rpartition(".")
        if part in ("factor", "best"):
            (progress.factors if part == "factor" else progress.best)[name] = tensor
        else:
            first, second = progress.moments.get(name, (torch.empty(0), torch.empty(0)))
            progress.moments[name] = (tensor, second) if part == "first" else (first, tensor)
    return progress
