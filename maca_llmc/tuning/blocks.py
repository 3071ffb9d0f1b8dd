"""Tune decoder layers one after the other, each behind those that are tuned already."""

import random
from typing import Any, Protocol

import torch
import tqdm

from maca_llmc.calibrate.hidden_states import HiddenStates
from maca_llmc.calibrate.pipeline import record_batches
from maca_llmc.llmcompressor_api import calibration_forward, decoder_layers, disable_offloading
from maca_llmc.tuning.integers import IntegerWeight, linears
from maca_llmc.tuning.layer import LayerResult, LayerTuner, Stream
from maca_llmc.tuning.options import BlockOptions
from maca_llmc.tuning.rounding import RoundedWeight
from maca_llmc.tuning.sensitivity import channel_sensitivity
from maca_llmc.tuning.windows import batches_of, hold_out, sample

CPU = torch.device("cpu")

Weights = dict[str, IntegerWeight]


class Keeper(Protocol):
    """Keeps finished layers, for a run that may be killed."""

    def restored(self, index: int) -> tuple[Weights, LayerResult] | None:
        """A layer that a killed run had finished; None for one that it had not."""

    def keep(self, weights: Weights, result: LayerResult) -> None:
        """Keep the next layer."""


def tune_blocks(
    base: Any,
    student: Any,
    weights: Weights,
    windows: list[torch.Tensor],
    options: BlockOptions,
    seed: int,
    dtype: torch.dtype,
    keeper: Keeper,
) -> tuple[Weights, list[LayerResult]]:
    """Tune every decoder layer.

    :param base: the unquantized model, whose layers are used up
    :param student: the quantized model, dequantized; left as it is tuned
    :param weights: its integer weights by name, to start from
    :param windows: token ids, each ``[T]``; some are held out, see ``windows.hold_out``
    :param dtype: to compute in
    :return: the weights after it, and what it did to each layer
    """
    lengths = [len(window) for window in windows]
    train, held = hold_out(lengths)
    sensitivity = _sensitivity(base, windows, options, seed)
    full, quantized = (_stream(model, windows, dtype) for model in (base, student))
    batches = batches_of(range(len(windows)), lengths, options.batch_tokens)
    names = {module: name for name, module in student.named_modules()}
    pairs = list(zip(decoder_layers(base), decoder_layers(student), strict=True))
    tuned, results = dict(weights), []
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for index, (original, layer) in enumerate(tqdm.tqdm(pairs, desc="tuning layers", unit="layer")):
        full.advance(original.to(dtype), index, batches)
        modules = dict(linears(layer.to(dtype), weights, names[layer]))
        originals = dict(linears(original, weights, names[layer]))
        known = keeper.restored(index)
        if known is None:
            rounded = {
                name: RoundedWeight(
                    weights[name].to(student.device), _weight(originals[name]).detach()
                )
                for name in modules
            }
            tuner = LayerTuner(
                layer,
                index,
                modules,
                rounded,
                quantized,
                full.hidden,
                lengths,
                options,
                sensitivity[index],
            )
            for module in modules.values():
                _weight(module).requires_grad_(True)
            result = tuner.tune(train, held, seed)
            found = {name: weight.result().to(CPU) for name, weight in rounded.items()}
            keeper.keep(found, result)
        else:
            found, result = known
            for name, module in modules.items():
                _weight(module).copy_(found[name].dequantized())
        for module in modules.values():
            _weight(module).requires_grad_(False)
        tuned |= found
        results.append(result)
        quantized.advance(layer, index, batches)
        original.to("meta")  # it has done its work
    return tuned, results


def _sensitivity(
    base: Any, windows: list[torch.Tensor], options: BlockOptions, seed: int
) -> list[torch.Tensor]:
    layers = decoder_layers(base)
    if not options.sensitivity_tokens:
        return [torch.ones(2, base.config.get_text_config().hidden_size) for _ in layers]
    lengths = [len(window) for window in windows]
    drawn = sample(lengths, options.sensitivity_tokens, random.Random(seed))
    some = [windows[number] for number in drawn]
    return channel_sensitivity(base, layers, some, options.batch_tokens, seed)


def _weight(module: torch.nn.Module) -> torch.Tensor:
    weight: Any = module.weight
    return weight


def _stream(model: Any, windows: list[torch.Tensor], dtype: torch.dtype) -> Stream:
    """Hidden states in front of a model's first layer, one batch a window."""
    hidden = HiddenStates()
    loader = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in windows]
    with calibration_forward(model), disable_offloading():
        devices = (model.device, torch.device("cpu"))
        calls = record_batches(model, decoder_layers(model), loader, devices, hidden)
    return Stream(calls, hidden, model.device, dtype)
