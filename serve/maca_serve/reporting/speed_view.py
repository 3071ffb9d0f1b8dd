"""Speed in rows of text, for the terminal and the report alike."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from maca_serve.speed.breakeven import describe_loads, in_words

Entry = dict[str, Any]
GIB = 1024**3


class Grid(NamedTuple):
    """A table; the first columns, by default one that names the checkpoint, say what a row is."""

    columns: list[str]
    rows: list[list[str]]
    keys: int = 1


def speed_grids(results: Entry) -> Iterator[Grid]:
    """All that there is: runs by requests in flight, by arrivals, break-even, memory."""
    entries = results["checkpoints"]
    yield in_flight_grid(entries)
    if "rates" in entries[0]:
        yield rates_grid(entries)
    if len(entries) > 1:
        yield break_even_grid(entries)
    yield memory_grid(entries)


def alike(entries: list[Entry]) -> Iterator[str]:
    """A sentence for every group of checkpoints for which the engine does the same work.

    Args:
        entries: checkpoints of results, the base first; it is in no group.
    """
    groups = defaultdict(list)
    for entry in entries[1:]:
        groups[entry["scheme"], entry["kernel"]].append(entry)
    for (scheme, kernel), group in groups.items():
        if len(group) > 1:
            yield (
                f"{_join([entry['name'] for entry in group])} have the same scheme ({scheme}) and"
                f" kernel ({kernel}), so the engine does the same work for them: what their ratios"
                f" differ by, {_join(_spreads(group))}, is what one start of an engine differs by"
                " from another, not the checkpoints, even where only one is called slower or"
                " faster."
            )


def in_flight_grid(entries: list[Entry]) -> Grid:
    """Medians over the rounds of what `vllm bench serve` said, and the ratio to the base."""
    columns = ["speed", "tokens in", "in flight", "TTFT ms", "TPOT ms", "E2EL ms", "p99"]
    columns += ["out tok/s", "tok/s", "ratio"]
    rows = []
    for entry in entries:
        ratios = entry["break_even"]["ratios"] if "break_even" in entry else None
        for length, runs in entry["throughput"].items():
            for level, run in runs.items():
                keys = ("output_tokens_per_s", "total_tokens_per_s")
                rates = [_show("{:.1f}", run[key]) for key in keys]
                ratio = _show("{:.2f}x", ratios[length][level]["ratio"] if ratios else None)
                rows.append([entry["name"], length, level, *_latencies(run), *rates, ratio])
    return Grid(columns, rows, keys=3)


def rates_grid(entries: list[Entry]) -> Grid:
    """What arrived and what was answered per second, with its latencies."""
    columns = ["arrivals", "tokens in", "per s", "answered", "TTFT ms", "TPOT ms", "E2EL ms", "p99"]
    rows = []
    for entry in entries:
        for length, runs in entry["rates"].items():
            for rate, run in runs.items():
                answered = _show("{:.2f}", run["requests_per_s"])
                rows.append([entry["name"], length, rate, answered, *_latencies(run)])
    return Grid(columns, rows, keys=3)


def break_even_grid(entries: list[Entry]) -> Grid:
    """Where along the requests in flight, and along the prompt lengths, each is faster."""
    base, *others = entries
    levels = list(map(int, next(iter(base["throughput"].values()))))
    lengths = list(map(int, base["throughput"]))
    rows = []
    for entry in others:
        found = entry["break_even"]
        for length, reached in found["by_length"].items():
            rows.append([entry["name"], f"{length} tokens in", in_words(reached, levels)])
        for level, reached in found["by_level"].items() if len(lengths) > 1 else ():
            rows.append([entry["name"], f"{level} in flight", in_words(reached, lengths)])
    return Grid([f"faster than {base['name']}", "with", "in flight, or tokens in"], rows)


def memory_grid(entries: list[Entry]) -> Grid:
    """Memory, and how near decoding comes to the speed of memory."""
    columns = ["memory", "weights GiB", "from", "KV cache GiB", "tokens", "GB per token", "of copy"]
    rows = [[entry["name"], *_memory(entry), *_share(entry)] for entry in entries]
    return Grid(columns, rows)


def _spreads(group: list[Entry]) -> list[str]:
    """Lowest and highest ratio under each load, e.g. `0.85x to 0.96x with 1 in flight`."""
    every = [describe_loads(entry["break_even"]["ratios"]) for entry in group]
    ratios = {load: [loads[load]["ratio"] for loads in every] for load in every[0]}
    return [f"{min(all_):.2f}x to {max(all_):.2f}x with {n}" for n, all_ in ratios.items()]


def _join(words: list[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def _show(form: str, value: float | None, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value / unit)


def _latencies(run: Entry) -> list[str]:
    return [
        _show("{:.0f}", run["ttft_ms"]["median"]),
        _show("{:.1f}", run["tpot_ms"]["median"]),
        _show("{:.0f}", run["e2el_ms"]["median"]),
        _show("{:.0f}", run["e2el_ms"]["p99"]),
    ]


def _memory(entry: Entry) -> list[str]:
    memory = entry["memory"]
    return [
        _show("{:.2f}", memory["weights_bytes"], GIB),
        memory["weights_source"],
        _show("{:.2f}", memory["kv_cache_bytes"], GIB),
        _show("{:,.0f}", memory["kv_cache_tokens"]),
    ]


def _share(entry: Entry) -> list[str]:
    bandwidth = entry["bandwidth"]
    if "share" not in bandwidth:
        return ["–", "–"]
    return [
        _show("{:.3f}", bandwidth["weights_bytes_per_token"], 1e9),
        _show("{:.0f}%", bandwidth["share"], 0.01),
    ]
