"""Learned rounding: where it starts and which way it goes."""

import pytest
import torch
from integers import integer_weight

from maca_llmc.tuning.rounding import RoundedWeight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_original", [True, False])
def test_it_starts_from_the_codes_bit_for_bit(symmetric, with_original):
    start = integer_weight(symmetric)
    original = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    rounded = RoundedWeight(start, original if with_original else None)
    result = rounded.result()
    assert torch.equal(result.codes, start.codes)
    assert torch.equal(result.scale, start.scale)
    assert torch.equal(rounded.weight(), start.dequantized())


def test_a_weight_near_the_edge_of_its_bin_moves_to_the_next_code():
    start = integer_weight(symmetric=True)
    original = start.dequantized() + 0.49 * start.scale.float().repeat_interleave(4, dim=1)
    rounded = RoundedWeight(start, original)
    towards = -start.scale.float().sign().repeat_interleave(4, dim=1)  # raises every level
    rounded.step(towards, rate=0.05, scale_rate=0.0)
    expected = (start.codes + 1).clamp(*start.limits)
    assert torch.equal(rounded.result().codes, expected.to(torch.int8))


def test_a_step_goes_down_the_gradient():
    start = integer_weight(symmetric=False)
    goal = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    rounded = RoundedWeight(start, goal)
    before = (rounded.weight() - goal).square().sum()
    for _ in range(20):
        rounded.step(2 * (rounded.weight() - goal), rate=0.02, scale_rate=0.01)
    assert (rounded.weight() - goal).square().sum() < before


def test_codes_move_by_one_at_most_and_stay_within_limits():
    start = integer_weight(symmetric=True)
    rounded = RoundedWeight(start, None)
    for _ in range(200):
        rounded.step(torch.randn(5, 12), rate=0.3, scale_rate=0.0)
    codes = rounded.result().codes.int()
    assert (codes - start.codes.int()).abs().max() <= 1
    assert codes.min() >= start.limits[0]
    assert codes.max() <= start.limits[1]


def test_state_comes_back():
    rounded = RoundedWeight(integer_weight(symmetric=True), None)
    before, state = rounded.result(), rounded.state()
    rounded.step(torch.ones(5, 12), rate=0.7, scale_rate=0.5)
    rounded.restore(state)
    assert torch.equal(rounded.result().codes, before.codes)
    assert torch.equal(rounded.result().scale, before.scale)
