"""GPTQ's column sweep within one block, compiled for the CPU: the codes of the eager loop.

llm-compressor's eager version makes a dozen tensor operations per column and is bound by the
interpreter. Rows are independent of each other, so here each row runs through the block's columns
by itself, in the same order of float32 operations: the results are equal bit for bit.
"""

import numba
import numpy as np
import torch


@numba.njit(inline="always")
def _round_to_bfloat16(value: np.float32) -> np.float32:
    """Round to nearest, ties to even, as torch does; finite values."""
    bits = np.float32(value).view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _sweep(work, factor, scale, zero_point, low, high, in_bfloat16, quantized, errors):  # type: ignore[no-untyped-def]
    rows, width = work.shape
    for row in numba.prange(rows):
        left = work[row]
        for column in range(width):
            weight = left[column]
            step, zero = scale[row, column], zero_point[row, column]
            code = np.rint(min(max(weight / step + zero, low), high))
            value = (code - zero) * step
            if in_bfloat16:
                value = _round_to_bfloat16(value)
            error = (weight - value) / factor[column, column]
            quantized[row, column] = value
            errors[row, column] = error
            # whole rows, though only later columns matter: this way the loop is vectorized
            spread = factor[column]
            for later in range(width):
                left[later] -= error * spread[later]


def sweep_block(
    work: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    code_range: tuple[float, float],
    quantized: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Quantize one block column by column, each error spread over the columns after it.

    Algorithm 1 of GPTQ (arXiv 2210.17323), inner loop. All tensors are on the CPU.

    :param work: ``[rows, width]`` float32, the weights of the block; changed in place
    :param factor: ``[width, width]`` float32, upper Cholesky factor of the inverse Hessian
    :param scale: ``[rows, width]`` float32 or bfloat16, one step per weight. Dequantized values
        are rounded to its dtype, as compressed-tensors does.
    :param zero_point: ``[rows, width]`` or None for 0
    :param code_range: lowest and highest code
    :param quantized: ``[rows, width]`` float32, out: dequantized values
    :param errors: ``[rows, width]`` float32, out: ``(w - q) / factor[i, i]``
    """
    zeros = torch.zeros_like(work) if zero_point is None else zero_point.float().contiguous()
    threads = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # made at run time
    numba.set_num_threads(min(threads, most))
    _sweep(
        work.numpy(),
        factor.contiguous().numpy(),
        scale.float().contiguous().numpy(),
        zeros.numpy(),
        np.float32(code_range[0]),
        np.float32(code_range[1]),
        scale.dtype == torch.bfloat16,
        quantized.numpy(),
        errors.numpy(),
    )
    if torch.get_num_threads() != threads:  # numba's first launch sets that of OpenMP, for all
        torch.set_num_threads(threads)
