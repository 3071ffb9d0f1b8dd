"""llm-compressor's ``gptq_block_update`` on the CPU: the compiled sweep, registered on import."""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationType

from maca_llmc.gptq.block_update import update_block
from maca_llmc.gptq.cpu_sweep import sweep_block
from maca_llmc.llmcompressor_api import ImplBackend


def _compiled_sweep_runs(W1: torch.Tensor, *_: Any, scale: Any, quant_args: Any, **__: Any) -> bool:
    return (
        W1.device.type == "cpu"
        and W1.dtype == torch.float32
        and scale.dtype in (torch.float32, torch.bfloat16)
        and quant_args.type == QuantizationType.INT
    )


@ImplBackend.register("gptq_block_update", _compiled_sweep_runs, 1)
def _gptq_block_update_compiled(*tensors: torch.Tensor, **given: Any) -> None:
    """llm-compressor's ``gptq_block_update`` on the CPU; same arguments, same codes."""
    update_block(sweep_block, *tensors, **given)
