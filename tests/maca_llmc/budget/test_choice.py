"""The knapsack against trying all choices."""

from itertools import product

import numpy as np
import pytest

from maca_llmc.budget.choice import choose
from maca_llmc.common.errors import UserError


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_budget_is_cheaper(seed):
    generator = np.random.default_rng(seed)
    sizes = np.sort(generator.integers(1, 50, (5, 3)), axis=1).astype(float)
    costs = -np.sort(-generator.random((5, 3)), axis=1)
    budget = float(generator.uniform(sizes[:, 0].sum(), sizes[:, -1].sum()))
    rows = range(5)
    best = min(
        costs[rows, list(c)].sum()
        for c in product(range(3), repeat=5)
        if sizes[rows, list(c)].sum() <= budget
    )
    chosen = choose(costs, sizes, budget)
    assert sizes[rows, chosen].sum() <= budget
    assert costs[rows, chosen].sum() <= best + 1e-5


def test_ties_go_to_fewer_schemes():
    assert choose(np.zeros((3, 2)), np.array([[1.0, 2.0]] * 3), 6.0) == [0, 0, 0]


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(UserError, match="the smallest of --choose takes"):
        choose(np.zeros((2, 1)), np.full((2, 1), 8e6), 8e6)
