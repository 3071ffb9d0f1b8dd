"""The report's first sentence: what a checkpoint costs in quality and gives in speed and size."""

from typing import Any

# A ratio closer to 1 than this is called neither faster nor slower: short runs scatter as much.
SAME_SPEED = 0.05


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


def describe_speed(base: dict[str, Any], entry: dict[str, Any]) -> str:
    """Output tokens per second against the base's at every number of requests in flight.

    Returns:
        E.g. `is faster (1.83x) with 1 in flight, slower than the base (0.54x) with 4 in flight`.
    """
    parts = []
    for level, run in entry["throughput"].items():
        ratio = run["output_tokens_per_s"] / base["throughput"][level]["output_tokens_per_s"]
        parts.append(f"{_in_words(ratio)} ({ratio:.2f}x) with {level} in flight")
    return "is " + ", ".join(parts)


def _in_words(ratio: float) -> str:
    if ratio < 1 - SAME_SPEED:
        return "slower than the base"
    return "faster" if ratio > 1 + SAME_SPEED else "about as fast"


def _clause(base: dict[str, Any], entry: dict[str, Any]) -> str:
    kept = entry["recovery"]["perplexity"]["mean"]
    size = 100.0 * entry["size_bytes"] / base["size_bytes"]
    return (
        f"{entry['name']} ({entry['scheme'].split(',')[0]}) recovers {kept:.1f} % of the base's"
        f" perplexity on average over lengths, takes {size:.0f} % of its space and"
        f" {describe_speed(base, entry)}"
    )
