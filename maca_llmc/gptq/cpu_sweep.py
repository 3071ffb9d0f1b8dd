"""GPTQ's column sweep within one block, compiled for the CPU: the codes of the eager loop.

llm-compressor's eager version makes a dozen tensor operations per column and is bound by the
interpreter. Rows are independent of each other, so here a few rows at a time run through the
block's columns, each in the same order of float32 operations: the results are equal bit for bit.
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


LANES = 64
"""Rows swept together: long vectors, and a block of them still within the first cache."""


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _sweep(  # type: ignore[no-untyped-def]
    work, factor, scale, zero_point, shifted, low, high, in_bfloat16, feed, fed, quantized, errors
):
    # all but the factor are [chunks, columns, LANES]: what is done to a column is done to all rows
    chunks, width, _ = work.shape
    for chunk in numba.prange(chunks):
        left, step, zero = work[chunk], scale[chunk], zero_point[chunk]
        value, error = quantized[chunk], errors[chunk]
        for column in range(width):
            diagonal = factor[column, column]
            for lane in range(LANES):
                own = step[column, lane]
                shift = zero[column, lane] if shifted else np.float32(0)
                code = np.rint(min(max(left[column, lane] / own + shift, low), high))
                value[column, lane] = (code - shift) * own
            if in_bfloat16:
                for lane in range(LANES):
                    value[column, lane] = _round_to_bfloat16(value[column, lane])
            for lane in range(LANES):
                error[column, lane] = (left[column, lane] - value[column, lane]) / diagonal
            for later in range(column + 1, width):
                spread = factor[column, later]
                for lane in range(LANES):
                    left[later, lane] -= error[column, lane] * spread
            if fed:
                for later in range(column + 1, width):
                    back = feed[column, later]
                    for lane in range(LANES):
                        left[later, lane] += left[column, lane] * back


def sweep_block(
    work: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    code_range: tuple[float, float],
    quantized: torch.Tensor,
    errors: torch.Tensor,
    feed: torch.Tensor | None = None,
) -> None:
    """Quantize one block column by column, each error spread over the columns after it.

    Algorithm 1 of GPTQ (arXiv 2210.17323), inner loop. All tensors are on the CPU.

    :param work: ``[rows, width]`` float32, the weights of the block; with ``feed`` each column as
        it was just before its rounding, out
    :param factor: ``[width, width]`` float32, upper Cholesky factor of the inverse Hessian
    :param scale: ``[rows, width]`` float32 or bfloat16, one step per weight. Dequantized values
        are rounded to its dtype, as compressed-tensors does.
    :param zero_point: ``[rows, width]`` or None for 0
    :param code_range: lowest and highest code
    :param quantized: ``[rows, width]`` float32, out: dequantized values
    :param errors: ``[rows, width]`` float32, out: ``(w - q) / factor[i, i]``
    :param feed: ``[width, width]`` float32, what each column adds to those after it (GPTAQ)
    """
    threads = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # made at run time
    numba.set_num_threads(min(threads, most))
    lanes = _in_lanes(work)
    steps = _in_lanes(scale, padding=1.0)
    shifted = zero_point is not None
    values, differences = torch.empty_like(lanes), torch.empty_like(lanes)
    _sweep(
        lanes.numpy(),
        factor.contiguous().numpy(),
        steps.numpy(),
        (_in_lanes(zero_point) if zero_point is not None else steps).numpy(),  # or not looked at
        shifted,
        np.float32(code_range[0]),
        np.float32(code_range[1]),
        scale.dtype == torch.bfloat16,
        (factor if feed is None else feed).contiguous().numpy(),  # or not looked at
        feed is not None,
        values.numpy(),
        differences.numpy(),
    )
    quantized.copy_(_in_rows(values)[: len(work)])
    errors.copy_(_in_rows(differences)[: len(work)])
    if feed is not None:
        work.copy_(_in_rows(lanes)[: len(work)])
    if torch.get_num_threads() != threads:  # numba's first launch sets that of OpenMP, for all
        torch.set_num_threads(threads)


def _in_lanes(rows: torch.Tensor, padding: float = 0.0) -> torch.Tensor:
    """``[rows, width]`` as float32 ``[chunks, width, LANES]``, missing rows filled up."""
    missing = -len(rows) % LANES
    padded = torch.nn.functional.pad(rows.float(), (0, 0, 0, missing), value=padding)
    return padded.view(-1, LANES, rows.shape[1]).transpose(1, 2).contiguous()


def _in_rows(lanes: torch.Tensor) -> torch.Tensor:
    """The reverse: ``[chunks * LANES, width]``."""
    return lanes.transpose(1, 2).reshape(-1, lanes.shape[1])
