"""The cheapest scheme for every part within a budget: an exact knapsack, by scipy's ``milp``."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from maca_llmc.common.errors import UserError

ONE_SCHEME = 1e-6
"""What a part that is not of the commonest scheme costs besides, of the largest cost: ties go to
fewer schemes."""


def choose(costs: NDArray[np.float64], sizes: NDArray[np.float64], budget: float) -> list[int]:
    """Which scheme each part gets, so that costs are least and sizes fit.

    :param costs: ``[parts, schemes]``
    :param sizes: so, in bits
    :param budget: of all sizes together
    :raises UserError: where even the smallest do not fit
    """
    parts, schemes = costs.shape
    least = sizes.min(axis=1).sum()
    if least > budget:
        raise UserError(
            f"the budget is {budget / 8e6:.1f} MB for what can be quantized, and the smallest of "
            f"--choose takes {least / 8e6:.1f} MB: raise it or give smaller schemes"
        )
    objective = costs / max(float(costs.max()), 1e-300)
    objective = objective + ONE_SCHEME * (np.arange(schemes)[None] > 0)
    each = np.kron(np.eye(parts), np.ones(schemes))
    found = milp(
        objective.ravel(),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint(sizes.ravel()[None] / budget, ub=1),
        ],
        integrality=np.ones(parts * schemes),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if found.x is None:
        raise UserError(f"no choice was found within the budget: {found.message}")
    return [int(row.argmax()) for row in found.x.reshape(parts, schemes)]
