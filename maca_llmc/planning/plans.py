"""What a quantize run would do and cost, found without loading weights."""

import math
import re
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy

from maca_llmc.budget.recipe import with_budget_recipe
from maca_llmc.calibrate.full_precision import asymmetric_modifiers
from maca_llmc.common.memory import available_memory
from maca_llmc.common.progress import quiet, tell
from maca_llmc.data.calibration import batches_of_equal_length
from maca_llmc.gptq.hessian import ROWS_AT_ONCE
from maca_llmc.gptq.stacks import ROWS_PER_STACK
from maca_llmc.llmcompressor_api import GPTQModifier, decoder_layers
from maca_llmc.options import QuantizeOptions, with_fields
from maca_llmc.planning.ask_doctor import ask_kernels
from maca_llmc.planning.distinct_inputs import distinct_inputs
from maca_llmc.recipe.containers import CONTAINER_BITS
from maca_llmc.recipe.schemes import describe_scheme
from maca_llmc.recipe.targets import linear_schemes, linear_widths
from maca_llmc.run.output import check_disk, resolve_output
from maca_llmc.run.prepare import Run, prepare

FLOAT32 = 4
UNNAMED = Path("checkpoint")
"""Stands for an output that is not given yet."""


@dataclass(frozen=True)
class Solve:
    """One distinct input: its width, and the rows of all modules that share it."""

    layer: int
    width: int
    rows: int


def plan(
    output: str | Path | None = None, options: QuantizeOptions | None = None, **fields: Any
) -> dict[str, Any]:
    """What :func:`maca_llmc.quantize` would do with the same arguments, and what it would take.

    Weights are not loaded. The serve environment is asked for its kernels, which takes about a
    minute. Sizes are in bytes, and estimates.

    :param output: where the checkpoint is to go; if None, only the current folder's disk is
        looked at
    :param options: as in :func:`maca_llmc.quantize`; so ``fields``
    :return: JSON-able: ``modules`` per scheme, ``unquantized`` with reasons, ``dropped``,
        ``hessians``, ``calibration``, ``memory``, ``checkpoint_bytes``, ``state_bytes``,
        ``kernels``
    :raises UserError: for what ``quantize`` refuses before it loads the model
    """
    tell("planning: asking the serve environment for its kernels takes a minute")
    with quiet():
        options = with_fields(options, fields)
        if options.bits is not None or options.size is not None:
            with tempfile.TemporaryDirectory() as folder:
                run = prepare(output, with_budget_recipe(options, Path(folder)))
        else:
            run = prepare(output, options)
        check_disk(resolve_output(output or UNNAMED), run.shapes)
        solves = find_solves(run)
    return {
        "modules": quantized_modules(run),
        "unquantized": unquantized_modules(run),
        "dropped": run.draft_layers,
        "hessians": {
            "modules": len(targeted(run)),
            "distinct": len(solves),
            "largest_layer_bytes": max(layer_hessians(solves).values(), default=0),
        },
        "calibration": run.calibration.record(),
        "memory": estimate_memory(run, solves),
        "checkpoint_bytes": checkpoint_bytes(run),
        "state_bytes": state_bytes(run),
        "kernels": ask_kernels(run),
    }


def targeted(run: Run) -> dict[str, int]:
    """Input widths of the modules that are quantized with a Hessian, by name."""
    found: dict[str, int] = {}
    for modifier in run.modifiers:
        if isinstance(modifier, GPTQModifier):
            found |= linear_widths(run.shapes, modifier.resolved_targets, modifier.ignore)
    return found


def quantized_modules(run: Run) -> list[dict[str, Any]]:
    """How many modules and parameters each scheme has."""
    counts: dict[str, dict[str, Any]] = {}
    for name, scheme in linear_schemes(run.modifiers, run.shapes).items():
        words = describe_scheme(scheme) + _container(scheme, run.container)
        entry = counts.setdefault(words, {"modules": 0, "parameters": 0})
        entry["modules"] += 1
        entry["parameters"] += run.shapes.get_submodule(name).weight.numel()
    return [{"scheme": scheme, **counts[scheme]} for scheme in counts]


def _container(scheme: QuantizationScheme, bits: int | None) -> str:
    """What stands behind a scheme whose codes are stored in wider containers."""
    weights = scheme.weights
    wider = bits is not None and weights is not None and weights.num_bits < bits
    return f", in {bits}-bit containers" if wider else ""


def unquantized_modules(run: Run) -> list[dict[str, Any]]:
    """Linears and embeddings that stay as they are, by reason."""
    quantized = linear_schemes(run.modifiers, run.shapes)
    counts: dict[str, dict[str, Any]] = {}
    for name, module in run.shapes.named_modules():
        if name in quantized or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        why = _reason(run, name, module)
        entry = counts.setdefault(why, {"modules": 0, "parameters": 0, "first": name})
        entry["modules"] += 1
        entry["parameters"] += module.weight.numel()
    return [{"why": why, **counts[why]} for why in counts]


def find_solves(run: Run) -> list[Solve]:
    """Every distinct input of the modules to quantize."""
    layer_of = {
        module: index
        for index, layer in enumerate(decoder_layers(run.shapes))
        for module in layer.modules()
    }
    solves = []
    for names in distinct_inputs(run.shapes, targeted(run)):
        modules = [run.shapes.get_submodule(name) for name in names]
        rows = sum(module.out_features for module in modules)
        solves.append(Solve(layer_of.get(modules[0], -1), modules[0].in_features, rows))
    return solves


def widest_input(run: Run, solves: list[Solve]) -> int:
    """Of what is quantized with a Hessian, or the hidden states' where nothing is."""
    hidden: int = run.config.get_text_config().hidden_size
    return max((solve.width for solve in solves), default=hidden)


def layer_hessians(solves: list[Solve]) -> dict[int, int]:
    """Bytes of the Hessians that a layer holds at once."""
    held: dict[int, int] = {}
    for solve in solves:
        held[solve.layer] = held.get(solve.layer, 0) + FLOAT32 * solve.width**2
    return held


def kept_width(run: Run, solves: list[Solve]) -> int:
    """Numbers kept of each token between two passes.

    For GPTAQ these are the hidden states of two models, and what a layer's modules receive in one.
    """
    width: int = run.config.get_text_config().hidden_size
    if not asymmetric_modifiers(run.modifiers):
        return width
    received: dict[int, int] = {}
    for solve in solves:
        received[solve.layer] = received.get(solve.layer, 0) + solve.width
    return 2 * width + max(received.values())


def estimate_memory(run: Run, solves: list[Solve]) -> dict[str, int]:
    """Peaks of host and device memory, in bytes, and what they consist of."""
    config = run.config.get_text_config()
    size = (config.dtype or torch.bfloat16).itemsize
    lengths = run.calibration.lengths
    batch = max(
        sum(lengths[index] for index in numbers)
        for numbers in batches_of_equal_length(lengths, run.batch_tokens)
    )
    hidden = sum(lengths) * kept_width(run, solves) * size
    weights = _bytes(run.shapes)
    free = available_memory()
    limit = max(free - weights, 0) // 2 if run.cache_bytes is None else run.cache_bytes
    there = hidden if run.hidden_place.type != "cpu" else 0
    held = min(hidden - there, limit)
    widest = widest_input(run, solves)
    activations = batch * (6 * config.hidden_size + 3 * widest) * size
    activations += min(batch, ROWS_AT_ONCE) * widest * FLOAT32
    working = max([activations, *map(_solving, solves)])
    layer = max(layer_hessians(solves).values(), default=0) + working
    host = psutil.Process().memory_info().rss + weights + held
    largest = max(_bytes(module) for module in decoder_layers(run.shapes))
    # Before the first layer all batches go through the embeddings, which are on the device then.
    embedding = _bytes(run.shapes.get_input_embeddings()) + batch * config.hidden_size * size
    on_host = run.device.type == "cpu"
    return {
        "weights": weights,
        "hidden_states": hidden,
        "spilled": hidden - there - held,
        "one_layer": layer,
        "host": host + max(layer if on_host else largest, checkpoint_bytes(run)),
        "device": 0 if on_host else max(largest + layer, embedding) + there,
    }


def state_bytes(run: Run) -> int:
    """What the finished layers take on disk until the end."""
    return sum(_bytes(layer) for layer in decoder_layers(run.shapes))


def checkpoint_bytes(run: Run) -> int:
    """Codes, scales and zero points of what is quantized, and all the rest as it is."""
    tied = bool(getattr(run.config.get_text_config(), "tie_word_embeddings", False))
    head = run.shapes.get_output_embeddings()
    total = 0
    quantized = linear_schemes(run.modifiers, run.shapes)
    for name, module in run.shapes.named_modules():
        if name in quantized:
            total += _packed_bytes(module, quantized[name].weights, run.container)
        elif not (tied and module is head):
            own = module.parameters(recurse=False)
            total += sum(parameter.numel() * parameter.element_size() for parameter in own)
    return total


def _packed_bytes(module: Any, args: Any, container: int | None) -> int:
    rows, width = module.weight.shape
    bits = max(args.num_bits, container or 0) if args.num_bits < CONTAINER_BITS else args.num_bits
    groups = {
        QuantizationStrategy.GROUP: lambda: width // args.group_size,
        QuantizationStrategy.TENSOR_GROUP: lambda: width // args.group_size,
        QuantizationStrategy.CHANNEL: lambda: 1,
    }
    scales = rows * groups[args.strategy]() if args.strategy in groups else 1
    codes = rows * math.ceil(width * bits / 32) * 4
    zero_points = 0 if args.symmetric else math.ceil(scales * bits / 8)
    bias = 0 if module.bias is None else rows
    return codes + zero_points + (scales + bias) * module.weight.element_size()


def _solving(solve: Solve) -> int:
    """The Hessian's copy in order, its inverse and factor, and some copies of the rows at once."""
    rows = min(solve.rows, ROWS_PER_STACK)
    return FLOAT32 * (3 * solve.width**2 + 4 * rows * solve.width)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _reason(run: Run, name: str, module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.Embedding):
        return "embeddings are looked up, not multiplied with"
    for entry in chain.from_iterable(modifier.ignore for modifier in run.modifiers):
        matches = (
            re.match(entry[3:], name)
            if entry.startswith("re:")
            else entry in (name, type(module).__name__)
        )
        if matches:
            return f"{entry!r} is in the recipe's ignore list"
    return "no scheme of the recipe targets it"
