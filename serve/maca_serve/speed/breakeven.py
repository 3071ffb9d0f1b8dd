"""How much faster than the base, and where that ends: by batch size and by prompt length."""

import statistics
from typing import Any

Entry = dict[str, Any]
FASTER, SAME, SLOWER = "faster", "about as fast", "slower"
UNCLEAR = "not clearly faster or slower"
# A ratio closer to 1 than this is called neither faster nor slower: short runs scatter as much.
MARGIN = 0.05


def break_even(base: Entry, entry: Entry) -> Entry:
    """Compare output tokens per second with a base's in the same run.

    Args:
        base: with `throughput` by prompt length and requests in flight.
        entry: with the same.

    Returns:
        `against`, the base's name; `ratios` by prompt length and requests in flight, see `ratio`;
        `by_length`: for every prompt length, where along the requests in flight it is faster, and
        `by_level`: for every number in flight, where along the prompt lengths, see `reach`.
    """
    ratios = {
        length: {
            level: ratio(base["throughput"][length][level], run) for level, run in runs.items()
        }
        for length, runs in entry["throughput"].items()
    }
    levels = next(iter(ratios.values()))
    return {
        "against": base["name"],
        "ratios": ratios,
        "by_length": {length: reach(row) for length, row in ratios.items()},
        "by_level": {
            level: reach({length: row[level] for length, row in ratios.items()}) for level in levels
        },
    }


def ratio(base: Entry, run: Entry) -> Entry:
    """One load's ratio: the median over rounds, each against the base's run of the same round.

    Returns:
        {"ratio", "rounds", "verdict"}: faster where the ratio is above 1 by more than MARGIN and
        no round says otherwise, slower likewise; about as fast where it is within MARGIN of 1 and
        every round within twice that; unclear else.
    """
    rounds = [own / other for own, other in zip(run["rounds"], base["rounds"], strict=True)]
    middle = statistics.median(rounds)
    verdict = UNCLEAR
    if abs(middle - 1) <= MARGIN and all(abs(each - 1) <= 2 * MARGIN for each in rounds):
        verdict = SAME
    if middle > 1 + MARGIN and min(rounds) > 1:
        verdict = FASTER
    if middle < 1 - MARGIN and max(rounds) < 1:
        verdict = SLOWER
    return {"ratio": middle, "rounds": rounds, "verdict": verdict}


def describe_loads(ratios: Entry) -> Entry:
    """Ratios by load in words; prompts are named where there are several lengths.

    Args:
        ratios: by prompt length and requests in flight.
    """
    return {
        f"{level} in flight" + (f" at prompts of {length}" if len(ratios) > 1 else ""): found
        for length, by_level in ratios.items()
        for level, found in by_level.items()
    }


def reach(ratios: dict[str, Entry]) -> Entry:
    """Where along batch sizes or prompt lengths a model is faster; nothing is interpolated.

    Args:
        ratios: see `ratio`, by number.

    Returns:
        {"faster_at": measured numbers, "stops_at": the smallest from which on it is faster at none
        that was measured, null where it is faster at the largest or at none}.
    """
    numbers = sorted(ratios, key=int)
    faster = [int(number) for number in numbers if ratios[number]["verdict"] == FASTER]
    beyond = [int(number) for number in numbers if faster and int(number) > faster[-1]]
    return {"faster_at": faster, "stops_at": beyond[0] if beyond else None}


def in_words(reached: Entry, measured: list[int]) -> str:
    """What `reach` found, e.g. `up to 4, no longer at 8`.

    Args:
        reached: what it found.
        measured: the numbers, increasing.
    """
    faster, stops = reached["faster_at"], reached["stops_at"]
    if not faster:
        return "nowhere"
    if faster == measured:
        return "at all measured"
    if faster == measured[: len(faster)]:
        return f"up to {faster[-1]}, no longer at {stops}"
    return f"at {', '.join(map(str, faster))} only"
