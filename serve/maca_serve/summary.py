"""The report's first sentence: what a checkpoint costs in quality and gives in speed and size."""

from typing import Any

from maca_serve.breakeven import FASTER, SAME, SLOWER

_WORDS = {FASTER: "faster", SAME: "about as fast", SLOWER: "slower than the base"}


def summarize(results: dict[str, Any]) -> str:
    """One sentence with each checkpoint's recovery, speed and size against the base.

    Args:
        results: as in results.json.
    """
    base, *others = results["checkpoints"]
    machine = results["machine"]
    where = " and ".join(machine["gpus"]) or f"{machine['cpu']} ({machine['cores']} cores)"
    clauses = "; ".join(_clause(base, other) for other in others)
    return f"Against {base['name']} ({base['scheme']}) on {where}: {clauses}."


def describe_speed(entry: dict[str, Any]) -> str:
    """Output tokens per second against the base's at every number of requests in flight.

    Args:
        entry: a quantized checkpoint's, with `break_even`.

    Returns:
        E.g. `is faster (1.83x) with 1 in flight, slower than the base (0.54x) with 4 in flight`,
        at the shortest prompts.
    """
    ratios = entry["break_even"]["ratios"]
    shortest = min(ratios, key=int)
    parts = [
        f"{_WORDS[found['verdict']]} ({found['ratio']:.2f}x) with {level} in flight"
        for level, found in ratios[shortest].items()
    ]
    where = f" at prompts of {shortest} tokens" if len(ratios) > 1 else ""
    return f"is {', '.join(parts)}{where}"


def _clause(base: dict[str, Any], entry: dict[str, Any]) -> str:
    kept = entry["recovery"]["perplexity"]["mean"]
    size = 100.0 * entry["size_bytes"] / base["size_bytes"]
    return (
        f"{entry['name']} ({entry['scheme'].split(',')[0]}) recovers {kept:.1f} % of the base's"
        f" perplexity on average over lengths, takes {size:.0f} % of its space and"
        f" {describe_speed(entry)}"
    )
