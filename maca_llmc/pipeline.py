"""A calibration pipeline that runs decoder layers themselves instead of a traced graph.

llm-compressor's sequential pipeline traces the model, forces eager attention and keeps a
``[T, T]`` mask per batch. Here the model runs once with its layers replaced by recorders, which
says what each layer is called with; from then on layers are called directly, with the model's own
attention (SDPA, which needs no mask without padding), so time and memory grow with the tokens and
not with ``T^2``. Picked by ``maca-llmc quantize``, or by ``oneshot(pipeline="maca")``. A model that
does not fit this goes through the sequential pipeline, with a warning that says why.
"""

from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch.utils._pytree import tree_map

from maca_llmc.llmcompressor_api import (
    CalibrationPipeline,
    HooksMixin,
    LifecycleCallbacks,
    SequentialPipeline,
    active_session,
    calibration_forward,
    decoder_layers,
    disable_offloading,
    onload_device,
)

NAME = "maca"

Call = tuple[tuple[Any, ...], dict[str, Any]]


class UnsupportedModelError(Exception):
    """The model is not a stack of decoder layers that can be called one by one; says why."""


@dataclass
class Batch:
    """One batch on its way through the model.

    :param hidden: ``[b, T, d]``, what the next layer gets
    :param calls: per layer, the rest of what it is called with
    """

    hidden: torch.Tensor
    calls: list[Call]


class Recorder(torch.nn.Module):
    """Stands in for a layer: notes what it is called with and passes hidden states through."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not as a submodule: nothing may find it here
        self.hidden: Any = None
        self.call: Call = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # models look at attention_type and the like

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Record the call; the output is the input."""
        self.hidden, self.call = hidden_states, (args, kwargs)
        return hidden_states


@CalibrationPipeline.register(NAME)
class LayerPipeline(CalibrationPipeline):
    """Calibrate and quantize one decoder layer after the other."""

    @staticmethod
    def __call__(model: Any, dataloader: Any, dataset_args: Any) -> None:
        """Run all batches through each layer, once to calibrate it and once to pass them on."""
        layers = decoder_layers(model)
        device = onload_device(model)
        store = torch.device(dataset_args.sequential_offload_device)
        try:
            check_targets(model, layers)
            with calibration_forward(model):
                batches = record_batches(model, layers, dataloader, device, store)
        except UnsupportedModelError as error:
            logger.warning(f"calibrating through llm-compressor's sequential pipeline: {error}")
            SequentialPipeline()(model, dataloader, dataset_args)
            return
        LifecycleCallbacks.calibration_start()
        with calibration_forward(model):
            for index, layer in enumerate(layers):
                with disable_offloading():
                    for number, batch in enumerate(batches):
                        active_session().state.current_batch_idx = number
                        call_layer(layer, batch, index, device)
                    LifecycleCallbacks.sequential_epoch_end(list(layer.modules()))
                    if index + 1 < len(layers):
                        with HooksMixin.disable_hooks():
                            for batch in batches:
                                batch.hidden = call_layer(layer, batch, index, device).to(store)
        LifecycleCallbacks.calibration_end()


def check_targets(model: torch.nn.Module, layers: list[torch.nn.Module]) -> None:
    """Check that decoder layers hold all that is to be quantized.

    :raises UnsupportedModelError: naming a module outside of them (a quantized lm_head)
    """
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme") and module not in inside:
            raise UnsupportedModelError(f"{name} is to be quantized and in no decoder layer")


def record_batches(
    model: Any,
    layers: list[torch.nn.Module],
    dataloader: Any,
    device: torch.device,
    store: torch.device,
) -> list[Batch]:
    """Run the model around its layers: the embeddings, and what each layer is called with.

    :raises UnsupportedModelError: when hidden states do not go from layer to layer unchanged
    """
    names = {module: name for name, module in model.named_modules()}
    recorders = [Recorder(layer) for layer in layers]
    batches = []
    try:
        for layer, recorder in zip(layers, recorders, strict=True):
            model.set_submodule(names[layer], recorder)
        for inputs in dataloader:
            model(**move(inputs, device))
            hidden = recorders[0].hidden
            if any(recorder.hidden is not hidden for recorder in recorders):
                raise UnsupportedModelError("hidden states change between its decoder layers")
            calls = move([recorder.call for recorder in recorders], store)
            batches.append(Batch(hidden.to(store), calls))
    except (TypeError, IndexError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"{type(error).__name__}: {error}") from error
    finally:
        for layer in layers:
            model.set_submodule(names[layer], layer)
    return batches


def call_layer(
    layer: torch.nn.Module, batch: Batch, index: int, device: torch.device
) -> torch.Tensor:
    """Output of a layer for one batch, ``[b, T, d]``."""
    args, kwargs = move(batch.calls[index], device)
    output = layer(batch.hidden.to(device), *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def move(values: Any, device: torch.device) -> Any:
    """Any nest of values with its tensors on ``device``; one tensor stays one."""
    moved: dict[int, torch.Tensor] = {}

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return moved.setdefault(id(value), value.to(device))

    return tree_map(place, values)
