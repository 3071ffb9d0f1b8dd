"""Quantize the stacked rows of modules that share a Hessian, as llm-compressor would each alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
)

from maca_llmc.gptq.gptaq import asymmetric_block_update
from maca_llmc.gptq.losses import active_report, relative_error, row_energies
from maca_llmc.gptq.scales import are_searched, column_costs
from maca_llmc.gptq.solve import BlockUpdate, Factor, sweep
from maca_llmc.llmcompressor_api import (
    batch_key,
    disable_offloading,
    gptq_block_update,
    update_batch_qparams,
)
from maca_llmc.recipe.schemes import BY_ROW

QuantizedModule = Any
"""A module that llm-compressor gave a ``quantization_scheme`` and a ``weight_observer``."""

ScaleSearch = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""``scales.search_scales``: of a weight, the costs of its columns and energies of its rows."""

ROWS_PER_STACK = 32768
"""Rows swept at once: what bounds the memory of a solve for hundreds of experts."""


def row_stacks(modules: list[QuantizedModule]) -> list[list[QuantizedModule]]:
    """Split modules of one input into stacks whose rows one sweep can quantize.

    Together go modules of the same quantization arguments, dtype and device, where scales belong
    to rows; any other module stays by itself.
    """
    stacks: list[list[QuantizedModule]] = []
    open_stacks: dict[Any, list[QuantizedModule]] = {}
    for module in modules:
        key = batch_key(module)
        if key is None or module.quantization_scheme.weights.strategy not in BY_ROW:
            stacks.append([module])
            continue
        shape, *alike = key
        like = (shape[1], *alike)
        stack = open_stacks.get(like)
        if stack is None or sum(len(m.weight) for m in stack) + shape[0] > ROWS_PER_STACK:
            stack = open_stacks[like] = []
            stacks.append(stack)
        stack.append(module)
    return stacks


def cut_batches(batches: list[list[QuantizedModule]]) -> list[list[QuantizedModule]]:
    """Cut batches of modules of one shape, so that no more rows than ``ROWS_PER_STACK`` meet.

    llm-compressor batches what its estimate of a solve lets into three quarters of a GPU's free
    memory; ours holds more at once, and how much is free differs from run to run.
    """
    return [
        batch[start : start + most]
        for batch in batches
        for most in [max(1, ROWS_PER_STACK // len(batch[0].weight))]
        for start in range(0, len(batch), most)
    ]


@torch.no_grad()
def quantize_stacks(
    stacks: list[list[QuantizedModule]],
    factors: list[Factor],
    hessians: list[torch.Tensor],
    block_size: int,
    search: ScaleSearch | None,
    feeds: torch.Tensor | None = None,
) -> None:
    """Quantize stacks of modules side by side, each stack with a Hessian of its own.

    The codes are those that llm-compressor's ``quantize_weight`` gives each module alone, from the
    same scales.

    :param stacks: as :func:`row_stacks` makes them, all of one shape
    :param factors: of each stack's Hessian
    :param hessians: float32 ``[d, d]``, one a stack, to relate losses to
    :param search: finds scales under the Hessian; None to ask the observer
    :param feeds: ``[stacks, d, d]``, GPTAQ's feedback of each stack; None for GPTQ
    """
    with disable_offloading():
        args = stacks[0][0].quantization_scheme.weights
        modules = [module for stack in stacks for module in stack]
        qparams = {module: module.weight_observer.get_qparams() for module in modules}
        rows = [len(module.weight) for module in stacks[0]]
        weights = _stacked(stacks, lambda module: module.weight.float())
        energies = torch.stack(
            [row_energies(w, hessian) for w, hessian in zip(weights, hessians, strict=True)]
        )
        if search is not None and are_searched(args):
            for stack, factor, energy in zip(stacks, factors, energies, strict=True):
                costs = column_costs(factor.upper, factor.order)
                for module, own in zip(stack, energy.split(rows), strict=True):
                    scale, zero_point = search(module.weight, costs, own, args)
                    qparams[module] |= {"scale": scale, "zero_point": zero_point}
        update = _block_update(
            gptq_block_update if feeds is None else asymmetric_block_update,
            stacks,
            qparams,
            args,
            factors,
        )
        quantized, losses = sweep(weights, factors, update, block_size, feeds)
        # by module and not stacked as stock's, which are only ever indexed
        parts: Any = [part for stacked in quantized for part in stacked.split(rows)]
        scales: Any = [qparams[module]["scale"] for module in modules]
        zero_points: Any = [qparams[module]["zero_point"] for module in modules]
        global_scales: Any = _global_scales(modules, qparams)
        update_batch_qparams(modules, parts, scales, zero_points, global_scales, args)
    report = active_report()
    if report is not None:
        sums = zip(modules, _sums(losses, rows), _sums(energies, rows), strict=True)
        for module, loss, energy in sums:
            report(module, relative_error(loss, energy))


def _sums(values: torch.Tensor, rows: list[int]) -> list[float]:
    return [float(part.sum()) for stacked in values for part in stacked.split(rows)]


def _stacked(stacks: Any, of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """One matrix per stack; a stack of one may have a scale that is none."""
    return torch.stack(
        [of(stack[0]) if len(stack) == 1 else torch.cat([of(m) for m in stack]) for stack in stacks]
    )


def _global_scales(modules: Any, qparams: Any) -> list[torch.Tensor] | None:
    if qparams[modules[0]]["global_scale"] is None:
        return None
    return [qparams[module]["global_scale"].reshape(-1)[0] for module in modules]


def _block_update(
    update: BlockUpdate, stacks: Any, qparams: Any, args: Any, factors: list[Factor]
) -> BlockUpdate:
    """A block update, given everything but the block."""
    global_scales = _global_scales([stack[0] for stack in stacks], qparams)
    scale = _stacked(stacks, lambda module: qparams[module]["scale"])
    zero_point = _stacked(stacks, lambda module: qparams[module]["zero_point"])
    if scale.device.type != "cpu":  # where the sweep is ours and takes either sign
        scale, zero_point, args = positive_scales(scale, zero_point, args)
    return partial(
        update,
        scale=scale,
        zero_point=zero_point,
        global_scale=None if global_scales is None else torch.stack(global_scales),
        g_idx=_column_groups(args, factors),
        quant_args=args,
    )


def positive_scales(
    scale: torch.Tensor, zero_point: torch.Tensor, args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor, QuantizationArgs]:
    """The same values to round to, said without negative scales.

    llm-compressor's CUDA kernel takes every scale below zero for zero. A step of -s with codes -4
    to 3 is a step of s with codes -3 to 4: those of -4 to 3 around a zero point of -1.
    """
    if not (args.symmetric and bool((scale < 0).any())):
        return scale, zero_point, args
    asymmetric = args.model_copy(update={"symmetric": False})
    return scale.abs(), -(scale < 0).to(zero_point.dtype), asymmetric


def _column_groups(args: Any, factors: list[Factor]) -> torch.Tensor | None:
    """Which scale each column has, in the order of the sweep; None where columns share one."""
    if args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        size = args.group_size
    elif args.strategy == QuantizationStrategy.BLOCK:
        size = args.block_structure[1]
    else:
        return None
    upper = factors[0].upper
    groups = torch.arange(upper.shape[0], device=upper.device, dtype=torch.int) // size
    if args.actorder == ActivationOrdering.WEIGHT:
        return torch.stack([groups[factor.order] for factor in factors])
    return groups
