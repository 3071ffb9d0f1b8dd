"""What is kept of the inputs of a group of modules: their second moments."""

from dataclasses import dataclass

import torch

from maca_llmc.gptq.hessian import WeightedHessian, add_cross


@dataclass
class Moments:
    """Second moments of weighted rows.

    :param hessian: of all rows
    :param count: how many sequences they are
    :param cross: float32 ``[d, d]``, ``2 * sum of weight * (x_fp - x_q) x_q^T``; None for GPTQ
    """

    hessian: WeightedHessian
    count: torch.Tensor
    cross: torch.Tensor | None = None

    @classmethod
    def onto(cls, hessian: torch.Tensor, *, asymmetric: bool) -> "Moments":
        """None yet, to be added up in ``hessian``, float32 ``[d, d]``, zero."""
        count = torch.zeros((), device=hessian.device)
        cross = torch.zeros_like(hessian) if asymmetric else None
        return cls(WeightedHessian(hessian), count, cross)

    def copy(self) -> "Moments":
        """Others of the same rows."""
        cross = None if self.cross is None else self.cross.clone()
        return Moments(self.hessian.copy(), self.count.clone(), cross)

    def add(self, rows: torch.Tensor, weight: float) -> None:
        """Add rows ``[tokens, d]``, each with this weight.

        Where there is a cross moment they are ``[tokens, 2 d]``: those of the unquantized model
        stand beside them.
        """
        if self.cross is not None:
            rows, full = rows.chunk(2, dim=-1)
            add_cross(self.cross, full, rows, weight)
        self.hessian.add(rows, weight)
