"""One block of columns, module by module: what llm-compressor's block update is given, unpacked."""

from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_range

from maca_llmc.llmcompressor_api import column_scale_window


def update_block(
    sweep: Callable[..., None],
    block: torch.Tensor,
    factor: torch.Tensor,
    quantized: torch.Tensor,
    errors: torch.Tensor,
    squares: torch.Tensor,
    *,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    quant_args: QuantizationArgs,
    i1: int,
    feed: torch.Tensor | None = None,
) -> None:
    """Quantize a block as llm-compressor's ``gptq_block_update`` does, by a sweep of our own.

    :param sweep: ``compiled_sweep.sweep_block``, or what takes the same arguments
    :param block: ``[b, rows, width]`` float32; with ``feed`` each column as it was just before its
        rounding, out
    :param factor: ``[b, width, width]``, the block of U
    :param quantized: dequantized values, out; so ``errors``, over the diagonal of U, and their
        ``squares``
    :param i1: the block's first column
    :param feed: ``[b, width, width]``, the block of GPTAQ's P; None for GPTQ
    """
    rows, width = block.shape[-2:]
    step, zero = column_scale_window(
        scale, zero_point, global_scale, g_idx, quant_args, num_rows=rows, i1=i1, i2=i1 + width
    )
    low, high = calculate_range(quant_args, block.device)
    for index in range(block.shape[0]):
        sweep(
            block[index],
            factor[index],
            step.expand(block.shape)[index],
            None if zero is None else zero.expand(block.shape)[index],
            (float(low), float(high)),
            quantized[index],
            errors[index],
            *(() if feed is None else (feed[index],)),
        )
    torch.square(errors, out=squares)
