"""The arms of the tuning benchmark, and what its page says of cells."""

import pytest

pytest.importorskip("llmcompressor", reason="it quantizes")

from accuracy_arms import LENGTHS, METHODS
from tuning import ARMS, AWQ, NEAREST, NEAREST_MSE
from tuning_page import minutes, ratio, start_of, table


def cell(arm, seed, kl, seconds):
    judged = {"kl": {str(length): {"mean": kl} for length in LENGTHS}}
    return {
        "arm": arm,
        "seed": seed,
        "test": judged,
        "wall_seconds": {"blocks": seconds},
        "tokens": 16384,
    }


GROUP = {
    "ours": {0: cell("ours", 0, 0.4, 300), 1: cell("ours", 1, 0.2, 300)},
    "light": {0: cell("light", 0, 0.3, 60), 1: cell("light", 1, 0.1, 60)},
    "both": {0: cell("both", 0, 0.2, 120)},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_way_begins_with_a_quantization_that_is_known(arm):
    first = ARMS[start_of(arm)]
    assert first.method in (AWQ, NEAREST, NEAREST_MSE, *METHODS) and first.start is None
    tunes = ARMS[arm].blocks is not None or ARMS[arm].end_to_end is not None
    assert tunes == (ARMS[arm].start is not None)


def test_ratios_are_taken_seed_by_seed_to_the_first_quantization():
    assert ratio(GROUP, "light", "test") == pytest.approx((0.75 + 0.5) / 2)
    assert ratio(GROUP, "both", "test") == pytest.approx(0.5)
    assert ratio(GROUP, "ours", "test") is None
    assert ratio(GROUP, "light", "validation") is None


def test_minutes_are_those_of_all_tuning_before():
    assert minutes(GROUP, "light", 0) == 1
    assert minutes(GROUP, "both", 0) == 3
    assert minutes(GROUP, "ours", 0) == 0


def test_the_best_arm_is_on_top():
    rows = table(GROUP, "test").splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| light", "| both", "| ours"]
    assert table(GROUP, "validation") == ""
