"""llm-compressor's ``gptq_block_update`` on the CPU: the compiled sweep, registered on import."""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_range

from maca_llmc.compiled_sweep import sweep_block
from maca_llmc.llmcompressor_api import ImplBackend, column_scale_window


def _compiled_sweep_runs(W1: torch.Tensor, *_: Any, scale: Any, quant_args: Any, **__: Any) -> bool:
    return (
        W1.device.type == "cpu"
        and W1.dtype == torch.float32
        and scale.dtype in (torch.float32, torch.bfloat16)
        and quant_args.type == QuantizationType.INT
    )


@ImplBackend.register("gptq_block_update", _compiled_sweep_runs, 1)
def _gptq_block_update_compiled(
    W1: torch.Tensor,
    Hinv1: torch.Tensor,
    Q1: torch.Tensor,
    Err1: torch.Tensor,
    losses1: torch.Tensor,
    *,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    quant_args: QuantizationArgs,
    i1: int,
) -> None:
    """llm-compressor's ``gptq_block_update`` on the CPU; same arguments, same codes."""
    rows, width = W1.shape[-2:]
    step, zero = column_scale_window(
        scale, zero_point, global_scale, g_idx, quant_args, num_rows=rows, i1=i1, i2=i1 + width
    )
    low, high = calculate_range(quant_args, W1.device)
    for index in range(W1.shape[0]):
        sweep_block(
            W1[index],
            Hinv1[index],
            step.expand(W1.shape)[index],
            None if zero is None else zero.expand(W1.shape)[index],
            (float(low), float(high)),
            Q1[index],
            Err1[index],
        )
    torch.square(Err1, out=losses1)
