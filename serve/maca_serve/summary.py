"""The report's first sentence: what a checkpoint costs in quality and gives in speed and size."""

from typing import Any

# Two speeds closer than this are called equal: runs of a few requests scatter by as much.
SAME_SPEED_PERCENT = 5.0


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


def speedup(base: dict[str, Any], entry: dict[str, Any], level: str) -> float:
    """Output tokens per second relative to the base's at the same number in flight."""
    own, other = entry["throughput"][level], base["throughput"][level]
    return float(own["output_tokens_per_s"] / other["output_tokens_per_s"])


def describe_speed(ratio: float) -> str:
    """`1.83x as fast`, and in words when it is slower or the same."""
    percent = 100.0 * (ratio - 1.0)
    if percent < -SAME_SPEED_PERCENT:
        return f"is slower than the base, {ratio:.2f}x its speed,"
    if percent < SAME_SPEED_PERCENT:
        return f"is about as fast as the base ({ratio:.2f}x)"
    return f"is {ratio:.2f}x as fast"


def _clause(base: dict[str, Any], entry: dict[str, Any]) -> str:
    kept = entry["recovery"]["perplexity"]["mean"]
    level = next(iter(entry["throughput"]))
    size = 100.0 * entry["size_bytes"] / base["size_bytes"]
    return (
        f"{entry['name']} ({entry['scheme'].split(',')[0]}) keeps {kept:.1f} % of its perplexity"
        f" on average over lengths, {describe_speed(speedup(base, entry, level))}"
        f" at {level} in flight and takes {size:.0f} % of the space"
    )
