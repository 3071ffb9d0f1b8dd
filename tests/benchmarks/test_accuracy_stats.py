"""The statistics of the accuracy page, on cells made up so that the answers are known."""

import math

import pytest

pytest.importorskip("scipy", reason="runs in the serve environment")

import numpy as np
from accuracy_arms import DEFAULT, LENGTHS
from accuracy_stats import (
    holm,
    mean_and_error,
    p_over_groups,
    paired_p,
    pairs_at,
    ratio_of_means,
    repeats,
    window_interval,
)
from accuracy_targets import STOCK, target_rows


def cell(level, seed=0, right=None, windows=(0.9, 1.0, 1.1)):
    """KL of ``level`` at 128, twice that at 512, three times at 2048."""
    kl = {
        str(length): {"mean": level * n, "windows": [level * n * w for w in windows]}
        for n, length in enumerate(LENGTHS, 1)
    }
    tasks = {"arc_easy": {"acc_norm_right": right}, "boolq": {"acc_right": right}} if right else {}
    return {"kl": kl, "seed": seed, "tasks": tasks}


def rejected(values, level):
    """Holm's step-down procedure as it is defined: the smallest p against level / m, and so on."""
    count = 0
    for p in sorted(values):
        if p > level / (len(values) - count):
            break
        count += 1
    return sorted(values)[:count]


def by_definition(values):
    """The lowest level at which each is rejected."""
    levels = np.linspace(0, 1, 100_001)
    return [next((x for x in levels if p in rejected(values, x)), 1.0) for p in values]


@pytest.mark.parametrize("values", [[0.01, 0.04, 0.03], [0.2, 0.5, 0.9], [0.001, 0.3, 0.002]])
def test_holm_is_its_definition(values):
    assert holm(values) == pytest.approx(by_definition(values), abs=2e-5)


def test_what_was_not_tested_is_left_out_of_the_correction():
    assert holm([None, 0.01, None, 0.04]) == [None, 0.02, None, 0.04]


def test_pairs_are_of_shared_seeds():
    cells = {"a": {0: cell(1.0), 2: cell(3.0)}, "b": {1: cell(5.0), 2: cell(2.0)}}
    assert pairs_at(cells, "a", "b", LENGTHS[1]) == [(6.0, 4.0)]
    assert ratio_of_means([(1.0, 2.0), (2.0, 4.0)]) == 0.5
    assert paired_p([(1.0, 2.0)]) is None
    # differences 1, 2, 3: t = 2 / (1 / sqrt 3), two degrees of freedom, whose tail is known
    t = 2 * math.sqrt(3)
    expected = 1 - t / math.sqrt(2 + t**2)
    assert paired_p([(2.0, 1.0), (4.0, 2.0), (6.0, 3.0)]) == pytest.approx(expected)


def test_a_cell_that_was_run_again_lies_beside_its_first_run():
    named = {"model": "m", "scheme": "s", "method": "a"}
    runs = [{**cell(1.0), **named}, {**cell(3.0, seed=1), **named}, {**cell(1.1), **named}]
    assert repeats(runs) == [pytest.approx([1.1, 1.1, 1.1])]


def test_seeds_of_one_model_and_scheme_count_once():
    by_group = [[-0.3, -0.5], [-0.1], [-0.2, -0.2, -0.2]]
    # means -0.4, -0.1, -0.2: t = sqrt 7, two degrees of freedom
    assert p_over_groups(by_group) == pytest.approx(1 - math.sqrt(7) / 3)
    assert p_over_groups([[-0.3, -0.5]]) is None


def test_an_interval_over_windows_is_of_the_ratio():
    length = LENGTHS[0]
    same = window_interval([cell(1.0)], [cell(2.0)], length)
    assert same == pytest.approx((0.5, 0.5)), "windows are paired: their level cancels"
    low, high = window_interval([cell(1.0, windows=(0.5, 1.0, 1.5))], [cell(1.0)], length)
    assert low < 1 < high


def test_errors_over_questions_are_of_the_mean_over_tasks():
    one, other = np.array([1.0, 0, 1, 1]), np.array([0.0, 0, 1])
    mean, error = mean_and_error([one, other])
    assert mean == pytest.approx(100 * (0.75 + 1 / 3) / 2)
    variance = (one.var(ddof=1) / 4 + other.var(ddof=1) / 3) / 4
    assert error == pytest.approx(100 * math.sqrt(variance))


def test_targets_are_computed_from_the_cells():
    right, wrong = [1, 1, 1, 0], [1, 0, 0, 0]
    own = {seed: cell(0.4 + 0.01 * seed, seed, right) for seed in range(3)}
    stock = {seed: cell(1.0 + 0.1 * seed, seed, wrong) for seed in range(3)}
    rows = target_rows(
        {("m", "w3-g32"): {DEFAULT: own, STOCK: stock}},
        [
            {"of": ("m", "w3-g32", STOCK, 128), "ratio": 0.4, "p": 0.01, "seeds": 3},
            {"of": ("m", "w3-g32", STOCK, 512), "ratio": 1.2, "p": 0.02, "seeds": 5},
        ],
    )
    found = {what.rpartition(": ")[2]: said for what, _, *said in rows}
    assert found["lower"] == ["in 1 of 2", "in 1 of 2"]
    assert found["lower with p < 0.05 (Holm)"] == ["in 1 of 2", "no"]
    assert found["significantly worse"] == ["in 1", "no"]
    assert found["seeds"] == ["0 to 3", "no"], "512 was not run"
    three, four = (f"default against stock ({STOCK}), {n} bits" for n in (3, 4))
    assert found[three] == ["0.37 / 0.37 / 0.37 m w3-g32", "yes"]
    assert found[four] == ["", "not measured"]
    words = f"standard deviation of KL over seeds, default / {STOCK}"
    assert found[words] == ["0.020 / 0.200 m w3-g32 (3 seeds)", "yes"]
    zero_shot, without = list(found.values())[-2:]
    assert zero_shot[0].startswith("+50.0 ± ") and zero_shot[1] == "yes"
    assert without[1] == ""
