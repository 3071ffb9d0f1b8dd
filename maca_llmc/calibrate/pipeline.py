"""A calibration pipeline that runs decoder layers themselves instead of a traced graph.

llm-compressor's sequential pipeline traces the model, forces eager attention and keeps a ``[T, T]``
mask per batch. Here the model runs once with its layers replaced by recorders, which says what each
layer is called with; from then on layers are called directly, with the model's own attention (SDPA,
which without padding needs a mask for sliding windows only, kept once for all batches of a length),
so time and memory grow with the tokens and not with ``T^2``. Between layers hidden states wait in a
bounded part of memory, the rest of them in files. Finished layers can be kept, and taken up again
by a later run.

Picked by ``maca-llmc quantize``, or by ``oneshot(pipeline="maca")``. A model that does not fit
this goes through the sequential pipeline, with a warning that says why.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from loguru import logger
from torch.utils._pytree import tree_leaves, tree_map

from maca_llmc.calibrate.full_precision import FullStream, asymmetric_modifiers
from maca_llmc.calibrate.hidden_states import HiddenStates
from maca_llmc.calibrate.smoothing import keeping_function, smoothers, transforms
from maca_llmc.common.device import compute_on, fast_linears
from maca_llmc.common.errors import CalibrationError
from maca_llmc.common.resource_errors import is_out_of_memory
from maca_llmc.gptq.shared_inputs import version_of
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
    patch_attr,
)
from maca_llmc.run.written import check_set, mark_unset

NAME = "maca"

Call = tuple[tuple[Any, ...], dict[str, Any]]
Kept = dict[tuple[int, torch.Size, torch.dtype], torch.Tensor]


class UnsupportedModelError(Exception):
    """The model is not a stack of decoder layers that can be called one by one; says why."""


class Keeper(Protocol):
    """Keeps finished layers, for a run that may be killed."""

    @property
    def finished(self) -> int:
        """How many layers are finished already."""

    def restore(self, index: int, layer: torch.nn.Module) -> None:
        """Make a layer what it was when it was finished."""

    def keep(self, layer: torch.nn.Module) -> None:
        """Keep the next finished layer."""


@dataclass
class Resources:
    """What a run gives the pipeline beyond what llm-compressor passes on.

    :param keeper: of finished layers; None to keep none
    :param hidden: where hidden states are between two layers
    """

    keeper: Keeper | None = None
    hidden: HiddenStates = field(default_factory=HiddenStates)


_given: list[Resources] = []


@contextmanager
def using(resources: Resources) -> Iterator[None]:
    """While open, have the pipeline use these."""
    _given.append(resources)
    try:
        yield
    finally:
        _given.pop()


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
        """Run all batches through each layer, to calibrate it and once more to pass them on."""
        layers = decoder_layers(model)
        device = onload_device(model)
        compute_on(device)
        store = torch.device(dataset_args.sequential_offload_device)
        resources = _given[-1] if _given else Resources()
        resources.hidden.device = store
        mark_unset(model)
        try:
            check_targets(model, layers)
            with calibration_forward(model), disable_offloading():  # embeddings come over once
                calls = record_batches(model, layers, dataloader, (device, store), resources.hidden)
        except UnsupportedModelError as error:
            logger.warning(
                f"calibrating through llm-compressor's sequential pipeline, which cannot be "
                f"resumed: {error}"
            )
            # It keeps masks of T^2 beside the hidden states that were found to fit on a GPU.
            dataset_args.sequential_offload_device = "cpu"
            SequentialPipeline()(model, dataloader, dataset_args)
            return
        LifecycleCallbacks.calibration_start()
        modifiers = active_session().lifecycle.recipe.modifiers
        if transforms(modifiers):
            # Rotations have just changed what goes into the first layer.
            with calibration_forward(model), HooksMixin.disable_hooks(), disable_offloading():
                calls = record_batches(model, layers, dataloader, (device, store), resources.hidden)
        batches = Batches(calls, resources.hidden, device)
        asymmetric = asymmetric_modifiers(modifiers)
        full = FullStream(resources.hidden, len(calls), asymmetric) if asymmetric else None
        with calibration_forward(model):
            for index, layer in enumerate(layers):
                with disable_offloading():
                    finish_layer(layer, index, batches, resources.keeper, full)
                    if index + 1 < len(layers):
                        with HooksMixin.disable_hooks():
                            for key, hidden in batches.outputs(layer, index):
                                resources.hidden.put(key, hidden)
        LifecycleCallbacks.calibration_end()


@dataclass
class Batches:
    """All batches, ready to go through a layer.

    :param calls: by batch and layer, what it is called with beside the hidden states
    :param hidden: the hidden states that go into the next layer
    :param device: to compute on
    """

    calls: list[list[Call]]
    hidden: HiddenStates
    device: torch.device

    def outputs(
        self, layer: torch.nn.Module, index: int, stream: str = ""
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Key and output ``[b, T, d]`` of a layer for each batch.

        :param stream: what the keys begin with: which of several hidden states go in
        """
        for number, by_layer in enumerate(self.calls):
            active_session().state.current_batch_idx = number
            args, kwargs = move(by_layer[index], self.device)
            key = f"{stream}{number}"
            # a copy: it is needed again, and a layer may write to its input
            hidden = self.hidden.get(key).to(self.device, copy=True)
            before = _versions(by_layer[index])
            with fast_linears(self.device):
                output = layer(hidden, *args, **kwargs)
            if _versions(by_layer[index]) != before:
                raise CalibrationError(
                    f"layer {index} writes in place to a mask or another argument, which is needed "
                    "again: have the model make a new tensor there"
                )
            output = output[0] if isinstance(output, tuple) else output
            yield key, output

    def update(self, layer: torch.nn.Module, index: int) -> torch.Tensor:
        """What a layer adds to the hidden states of the first batch, float32 ``[b, T, d]``."""
        with HooksMixin.disable_hooks():
            key, output = next(self.outputs(layer, index))
        return output.float() - self.hidden.get(key).to(self.device).float()


def finish_layer(
    layer: torch.nn.Module,
    index: int,
    batches: Batches,
    keeper: Keeper | None,
    full: FullStream | None,
) -> None:
    """Calibrate and quantize a layer, or take it from a run that has done so."""
    finished = keeper is not None and index < keeper.finished
    everything = list(layer.modules())
    modifiers = active_session().lifecycle.recipe.modifiers
    smoothing = smoothers(modifiers)
    # GPTAQ's full-precision stream goes through what smoothing left, also of finished layers.
    for modifier in smoothing if full is not None or not finished else []:
        with keeping_function(modifier, f"layer {index}", lambda: batches.update(layer, index)):
            calibrate([modifier], layer, index, batches, everything)
    stages = [everything]
    if full is not None:
        with HooksMixin.disable_hooks():
            outputs = batches.outputs(layer, index, full.PREFIX)
            stages = full.pass_through(layer, outputs, capture=not finished) or stages
    if keeper is not None and finished:
        keeper.restore(index, layer)
        return
    others = [modifier for modifier in modifiers if modifier not in smoothing]
    for stage in stages:
        with nullcontext() if full is None else full.calibrating(stage):
            calibrate(others, layer, index, batches, stage)
    check_set(layer, f"layer {index}: ")
    if keeper is not None:
        keeper.keep(layer)


def calibrate(
    modifiers: list[Any],
    layer: torch.nn.Module,
    index: int,
    batches: Batches,
    stage: list[torch.nn.Module],
) -> None:
    """Let these modifiers, no others, see the batches in a layer and then change modules of it."""
    hooks = {hook for modifier in modifiers for hook in modifier._hooks}
    with patch_attr(active_session().lifecycle.recipe, "modifiers", modifiers):
        with HooksMixin.disable_hooks(keep=hooks):
            for _ in batches.outputs(layer, index):
                pass  # what counts is what hooks see
        LifecycleCallbacks.sequential_epoch_end(stage)


def _versions(call: Call) -> list[int | None]:
    return [version_of(leaf) for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]


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
    devices: tuple[torch.device, torch.device],
    states: HiddenStates,
) -> list[list[Call]]:
    """Run the model around its layers: the embeddings, and what each layer is called with.

    :param devices: to compute on, and to keep things on
    :param states: takes the hidden states that go into the first layer
    :return: by batch and layer, the rest of what it is called with
    :raises UnsupportedModelError: when hidden states do not go from layer to layer unchanged
    """
    compute, store = devices
    names = {module: name for name, module in model.named_modules()}
    recorders = [Recorder(layer) for layer in layers]
    recorded = []
    kept: Kept = {}
    try:
        for layer, recorder in zip(layers, recorders, strict=True):
            model.set_submodule(names[layer], recorder)
        for number, inputs in enumerate(dataloader):
            model(**move(inputs, compute))
            hidden = recorders[0].hidden
            if any(recorder.hidden is not hidden for recorder in recorders):
                raise UnsupportedModelError("hidden states change between its decoder layers")
            recorded.append(move([recorder.call for recorder in recorders], store, kept))
            states.put(str(number), hidden)
    except (TypeError, IndexError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        raise UnsupportedModelError(f"{type(error).__name__}: {error}") from error
    finally:
        for layer in layers:
            model.set_submodule(names[layer], layer)
    return recorded


def move(values: Any, device: torch.device, kept: Kept | None = None) -> Any:
    """Any nest of values with its tensors on ``device``; one tensor stays one.

    :param kept: of nests moved before; where a tensor equals its counterpart in the last one of
        such shapes, that takes its place. Masks and rotary embeddings are alike in all batches.
    """
    moved: dict[int, torch.Tensor] = {}

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in moved:
            here = value.to(device)
            moved[id(value)] = here if kept is None else once(here, len(moved), kept)
        return moved[id(value)]

    return tree_map(place, values)


def once(value: torch.Tensor, place: int, kept: Kept) -> torch.Tensor:
    """The tensor that was kept at this place, if it is the same, or this one, which is kept now."""
    key = (place, value.shape, value.dtype)
    if key not in kept or not torch.equal(kept[key], value):
        kept[key] = value
    return kept[key]
