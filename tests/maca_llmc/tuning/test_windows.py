"""Steps over windows of several lengths."""

import random
from itertools import islice

from maca_llmc.tuning.windows import batches_of, hold_out, sample, steps

LENGTHS = [128] * 16 + [512] * 4 + [2048]


def test_some_windows_of_each_length_are_held_out():
    train, held = hold_out(LENGTHS, share=8)
    assert sorted([*train, *held]) == list(range(len(LENGTHS)))
    assert sorted(LENGTHS[i] for i in held) == [128, 128, 512]  # the only one of 2048 is trained on


def test_every_window_comes_once_before_any_comes_again():
    draw = steps(range(len(LENGTHS)), LENGTHS, tokens=1, generator=random.Random(0))
    drawn = [number for step in islice(draw, len(LENGTHS)) for batch in step for number in batch]
    assert sorted(drawn) == list(range(len(LENGTHS)))


def test_a_step_has_the_tokens_asked_for_and_batches_of_one_length():
    for step in islice(steps(range(21), LENGTHS, 1000, random.Random(1)), 12):
        assert sum(LENGTHS[i] for batch in step for i in batch) >= 1000
        assert all(len({LENGTHS[i] for i in batch}) == 1 for batch in step)


def test_batches_hold_so_many_tokens_or_one_window():
    batches = batches_of(range(21), LENGTHS, 600)
    assert all(sum(LENGTHS[i] for i in batch) <= 600 or len(batch) == 1 for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(21))


def test_a_sample_holds_so_many_tokens_or_all():
    drawn = sample(LENGTHS, 1000, random.Random(2))
    assert len(set(drawn)) == len(drawn)
    assert 1000 <= sum(LENGTHS[i] for i in drawn) < 1000 + 2048
    assert sample(LENGTHS, 10**6, random.Random(2)) == list(range(len(LENGTHS)))
