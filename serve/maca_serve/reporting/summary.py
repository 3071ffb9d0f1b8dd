"""The report's first screen: use a checkpoint or not, by stated rules, with the numbers."""

from typing import Any

from maca_serve.speed.breakeven import FASTER, MARGIN, SLOWER, UNCLEAR, describe_loads

# Percent of the base that must be left, at every length.
KEPT = 95.0

Entry = dict[str, Any]

USE = "use it"
USE_AT = "use it with {}"
MEMORY = "for memory only"
NO_GAIN = "no gain"
UNDECIDED = "undecided"
LOST = "not for quality"
RULES = {
    LOST: f"the whole interval of recovery lies below {KEPT:g} %: of perplexity at some length, or"
    " of the tasks in the mean",
    UNDECIDED: f"not that, but at some length the interval reaches below {KEPT:g} %: more"
    " `--windows` narrow it",
    USE: f"recovery is {KEPT:g} % or more at every length, the whole interval; it is smaller than"
    " the base, or faster at some number of requests in flight, and slower at none",
    USE_AT.format("N in flight"): "the same, but slower at other numbers of requests in flight",
    MEMORY: "the same recovery; it is smaller, somewhere slower and nowhere faster",
    NO_GAIN: "the same recovery; it is neither smaller nor faster",
    "watch": f"a probe, whose whole interval lies below {KEPT:g} % in the mean over lengths; it"
    " does not decide, since the probes are harder than most texts",
}


def judge(base: Entry, entry: Entry) -> dict[str, Any]:
    """Say whether to use a checkpoint, by RULES.

    Args:
        base: results of the base.
        entry: results of this one, with its recovery and break-even.

    Returns:
        {"verdict", "sentence": with its numbers, "worst_length", "size_percent": of the base's
        bytes, "speed": {load: see `maca_serve.speed.breakeven.ratio`},
        "lost" and "watch": what lies below KEPT for sure}.
    """
    percents = entry["recovery"]["perplexity"]
    worst = min(entry["perplexity"], key=lambda length: percents[length])
    found = {
        "worst_length": worst,
        "size_percent": 100.0 * entry["size_bytes"] / base["size_bytes"],
        "speed": describe_loads(entry["break_even"]["ratios"]),
        "lost": _lost(entry),
        "watch": _watch(entry),
    }
    verdict = _verdict(entry, found)
    return {"verdict": verdict, "sentence": _sentence(entry, found), **found}


def rules() -> dict[str, Any]:
    """Thresholds and rules, for results."""
    return {"kept_percent": KEPT, "same_speed": MARGIN, "verdicts": RULES}


def headline(results: dict[str, Any]) -> str:
    """What was compared with what, where, by which vLLM and when."""
    base, machine = results["checkpoints"][0], results["machine"]
    cores = f"{machine['cores']} core{'s' * (machine['cores'] != 1)}"
    where = " and ".join(machine["gpus"]) or f"{machine['cpu']} ({cores})"
    created = f", {results['created'][:10]}" if "created" in results else ""
    return (
        f"Against {base['name']} ({base['scheme']}) on {where},"
        f" vLLM {results['versions']['vllm']}{created}"
    )


def describe_speed(speed: dict[str, Any]) -> str:
    """Output tokens per second against the base's under every load.

    Returns:
        E.g. `faster (1.83x) with 1 in flight, slower than the base (0.54x) with 4 in flight`.
    """
    return ", ".join(f"{_how_fast(found)} with {load}" for load, found in speed.items())


def _how_fast(found: dict[str, Any]) -> str:
    ratio, rounds = f"{found['ratio']:.2f}x", found["rounds"]
    if found["verdict"] == UNCLEAR:
        return f"{UNCLEAR} ({ratio}, rounds of {min(rounds):.2f}x to {max(rounds):.2f}x)"
    return f"{found['verdict']}{' than the base' * (found['verdict'] == SLOWER)} ({ratio})"


def _verdict(entry: Entry, found: dict[str, Any]) -> str:
    if found["lost"]:
        return LOST
    if _undecided(entry):
        return UNDECIDED
    faster = [load for load, speed in found["speed"].items() if speed["verdict"] == FASTER]
    slower = any(speed["verdict"] == SLOWER for speed in found["speed"].values())
    smaller = found["size_percent"] < 100.0
    if not smaller and not faster:
        return NO_GAIN
    if not slower:
        return USE
    return USE_AT.format(" or ".join(faster)) if faster else MEMORY


def _undecided(entry: Entry) -> list[str]:
    """Lengths at which the interval of perplexity's recovery reaches below KEPT."""
    intervals = entry["recovery"]["intervals"]["perplexity"]
    return [length for length in entry["perplexity"] if intervals[length][0] < KEPT]


def _where(lengths: list[str]) -> str:
    *rest, last = lengths
    which = f"{', '.join(rest)} and {last}" if rest else last
    return f"at {which} tokens its interval reaches below {KEPT:g} %"


def _lost(entry: Entry) -> list[str]:
    kept, intervals = entry["recovery"], entry["recovery"]["intervals"]
    asked = [
        (f"perplexity at {length} tokens", kept["perplexity"][length], interval)
        for length, interval in intervals["perplexity"].items()
        if length != "mean"
    ]
    return _below([*asked, ("tasks", kept["tasks"]["mean"], intervals["tasks"]["mean"])])


def _watch(entry: Entry) -> list[str]:
    kept, intervals = entry["recovery"]["probes"], entry["recovery"]["intervals"]["probes"]
    return _below([(name, kept[name]["mean"], intervals[name]["mean"]) for name in kept])


def _below(asked: list[tuple[str, float, list[float] | None]]) -> list[str]:
    return [
        f"{what} {_percent(percent, interval)}"
        for what, percent, interval in asked
        if interval is not None and interval[1] < KEPT
    ]


def _sentence(entry: Entry, found: dict[str, Any]) -> str:
    kept, intervals = entry["recovery"]["perplexity"], entry["recovery"]["intervals"]["perplexity"]
    worst = found["worst_length"]
    lost = f" Below {KEPT:g} %: {', '.join(found['lost'])}." if found["lost"] else ""
    watch = f" Watch: {', '.join(found['watch'])}." if found["watch"] else ""
    open_at = [] if found["lost"] else _undecided(entry)
    undecided = f" Undecided: {_where(open_at)}; more --windows narrow it." if open_at else ""
    return (
        f"{entry['name']} ({entry['scheme'].split(',')[0]}) recovers"
        f" {_percent(kept['mean'], intervals['mean'])} of the base's perplexity on average over"
        f" lengths, {_percent(kept[worst], intervals[worst])} at its worst length, {worst} tokens;"
        f" it takes {found['size_percent']:.0f} % of the base's space and is"
        f" {describe_speed(found['speed'])}.{lost}{undecided}{watch}"
    )


def _percent(value: float, interval: list[float] | None) -> str:
    if interval is None:
        return f"{value:.1f} %"
    return f"{value:.1f} % ({interval[0]:.1f} to {interval[1]:.1f})"
