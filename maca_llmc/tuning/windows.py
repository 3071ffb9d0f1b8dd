"""Steps over calibration windows of several lengths, and the windows that are held out."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

HELD_OUT = 8
"""One window in so many is held out, and at least one of each length."""

Batch = list[int]
"""Numbers of windows of one length, which go through the model together."""


def hold_out(lengths: Sequence[int], share: int = HELD_OUT) -> tuple[list[int], list[int]]:
    """Part windows into those to train on and those that decide, by number.

    :param lengths: tokens of each window
    :param share: one in so many of each length is held out; a length with one window keeps it
        for training
    """
    train, held = [], []
    for same in _by_length(range(len(lengths)), lengths).values():
        out = max(1, len(same) // share) if len(same) > 1 else 0
        held += same[:out]
        train += same[out:]
    return sorted(train), sorted(held)


def steps(
    numbers: Sequence[int], lengths: Sequence[int], tokens: int, generator: random.Random
) -> Iterator[list[Batch]]:
    """Draw windows for ever, each once before any comes again, ``tokens`` or more a step.

    :param numbers: of the windows to draw
    :param lengths: tokens of every window
    """
    drawn: list[int] = []
    while True:
        order = list(numbers)
        generator.shuffle(order)
        for number in order:
            drawn.append(number)
            if sum(lengths[i] for i in drawn) >= tokens:
                yield batches_of(drawn, lengths, tokens)
                drawn = []


def sample(lengths: Sequence[int], tokens: int, generator: random.Random) -> list[int]:
    """Numbers of windows drawn at random until they hold ``tokens`` tokens, or all of them."""
    order = list(range(len(lengths)))
    generator.shuffle(order)
    drawn: list[int] = []
    while order and sum(lengths[number] for number in drawn) < tokens:
        drawn.append(order.pop())
    return sorted(drawn)


def batches_of(numbers: Iterable[int], lengths: Sequence[int], tokens: int) -> list[Batch]:
    """Put windows of one length together, at most ``tokens`` tokens or one window in a batch."""
    found: list[Batch] = []
    for length, together in _by_length(numbers, lengths).items():
        size = max(1, tokens // length)
        found += [together[i : i + size] for i in range(0, len(together), size)]
    return found


def _by_length(numbers: Iterable[int], lengths: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        found[lengths[number]].append(number)
    return dict(sorted(found.items()))
