"""Accumulate a weighted Hessian and prepare it for GPTQ's dampening."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GPTQ_FACTOR = 2.0
"""GPTQ's H is that of the squared error, 2 X^T X (arXiv 2210.17323, equation 2)."""

ROWS_AT_ONCE = 2048
"""Rows held as a float32 copy at a time, on devices that multiply in float32."""

TRIANGLE_BLOCK = {"cpu": 512, "cuda": 1024}
"""Columns per block of the lower triangle: see ``benchmarks/hessian_products.py``."""


SHORT = 512
"""Runs of fewer rows wait for others of their weight: a product of few rows is mostly writing."""

WAITING = 4 * ROWS_AT_ONCE
"""Most rows that wait, where there are many weights (documents of all lengths)."""


class WeightedHessian:
    """``H = 2 * sum of weight * rows^T rows``, its lower triangle until it is complete.

    :param hessian: float32 ``[d, d]``, zero
    """

    def __init__(self, hessian: torch.Tensor) -> None:
        self.hessian = hessian
        self._waiting: dict[float, list[torch.Tensor]] = {}
        self._rows: Counter[float] = Counter()

    def add(self, rows: torch.Tensor, weight: float) -> None:
        """Add rows ``[tokens, d]``, each of them with this weight."""
        if len(rows) >= SHORT:
            add_rows(self.hessian, rows, weight)
            return
        waiting = self._waiting.setdefault(weight, [])
        waiting.append(rows.clone())  # a view would keep the whole input
        self._rows[weight] += len(rows)
        if self._rows[weight] >= ROWS_AT_ONCE:
            self._add_waiting(weight)
        elif self._rows.total() >= WAITING:
            self.settle()

    def settle(self) -> None:
        """Add the rows that still wait."""
        for weight in list(self._waiting):
            self._add_waiting(weight)

    def copy(self) -> "WeightedHessian":
        """Another one of the same rows."""
        other = WeightedHessian(self.hessian.clone())
        other._waiting = {weight: list(rows) for weight, rows in self._waiting.items()}
        other._rows = self._rows.copy()
        return other

    def _add_waiting(self, weight: float) -> None:
        add_rows(self.hessian, torch.cat(self._waiting.pop(weight)), weight)
        del self._rows[weight]


def add_rows(hessian: torch.Tensor, rows: torch.Tensor, weight: float) -> None:
    """``H += 2 * weight * rows^T rows`` in the lower triangle of H, in place.

    Products of bfloat16 numbers are exact in float32, so bfloat16 rows are multiplied on tensor
    cores (CUDA) or AMX tiles (CPUs that have them) with float32 sums. The weight is applied to the
    product, not to the rows, so that inputs are never rounded. What is above the diagonal's blocks
    stays as it was: call :func:`mirror` when all rows are in.

    :param hessian: float32 ``[d, d]``
    :param rows: ``[tokens, d]``, any float dtype
    :param weight: weight of each of these tokens, not negative
    """
    rows = rows.to(hessian.device)
    on_tensor_cores = hessian.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    with _bfloat16_products(rows):
        for part in [rows] if on_tensor_cores else rows.split(ROWS_AT_ONCE):
            factors = part if on_tensor_cores else part.to(hessian.dtype)
            for target, left, right in _lower_blocks(hessian, factors):
                _add_product(target, left, right, GPTQ_FACTOR * weight, on_tensor_cores)


def add_cross(cross: torch.Tensor, full: torch.Tensor, rows: torch.Tensor, weight: float) -> None:
    """``D += 2 * weight * (full - rows)^T rows``, in place: GPTAQ's asymmetry (arXiv 2504.02692).

    :param cross: float32 ``[d, d]``
    :param full: ``[tokens, d]``, what the unquantized model has where ``rows`` are
    """
    for part, own in zip(full.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), strict=True):
        own = own.to(cross)
        cross.addmm_((part.to(cross) - own).t(), own, alpha=GPTQ_FACTOR * weight)


def mirror(hessian: torch.Tensor) -> None:
    """Copy the lower triangle to the upper one, in place."""
    for start, stop in _blocks(hessian):
        hessian[start:stop, stop:] = hessian[stop:, start:stop].t()


def fill_dead_columns(hessian: torch.Tensor) -> int:
    """Give columns that no token ever excited the mean diagonal of the live ones, in place.

    Stock GPTQ writes an absolute 1 there and then dampens by a mean that includes it, so a common
    factor on H would no longer cancel. With the live mean it does, and a dead column, which is
    uncorrelated with all others, is simply rounded to nearest.

    :param hessian: ``[d, d]``
    :return: how many columns were dead; ``d`` when all are, in which case H becomes the identity
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    count = int(dead.sum())
    if count == diagonal.numel():
        diagonal.fill_(1.0)
    elif count:
        diagonal[dead] = diagonal[~dead].mean()
    return count


def _blocks(hessian: torch.Tensor) -> list[tuple[int, int]]:
    """Where the blocks of columns start and stop; one block where several would not pay."""
    width = hessian.shape[0]
    block = TRIANGLE_BLOCK.get(hessian.device.type, width)
    if width < 2 * block:
        block = width
    return [(start, min(start + block, width)) for start in range(0, width, block)]


def _lower_blocks(
    hessian: torch.Tensor, rows: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Blocks of columns from the diagonal down, and the two factors of what is added to each."""
    for start, stop in _blocks(hessian):
        yield hessian[start:, start:stop], rows[:, start:].t(), rows[:, start:stop]


def _add_product(
    target: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    on_tensor_cores: bool,
) -> None:
    if on_tensor_cores:
        target.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=factor)
    else:
        target.addmm_(left, right, alpha=factor)


@contextmanager
def _bfloat16_products(rows: torch.Tensor) -> Iterator[None]:
    """On the CPU, multiply float32 copies of bfloat16 rows in bfloat16: the same products, exactly.

    oneDNN then uses AMX where there is any, and sums in float32. With AVX512-BF16 alone it
    multiplies in float32 (seen in its log, 2.13.0+cpu): not faster, and not less exact.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.bfloat16:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
