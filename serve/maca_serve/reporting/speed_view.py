"""Speed in rows of text, for the terminal and the report alike."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from maca_serve.speed.breakeven import describe_loads, in_words

Entry = dict[str, Any]
Keys = tuple[str | int, ...]
GIB = 1024**3


class Number(str):
    """A number as text that knows where it comes from.

    Attributes:
        keys: its place in results.
        unit: what it is divided by there.
    """

    keys: Keys
    unit: float

    def __new__(cls, text: str, keys: Keys, unit: float) -> "Number":
        """The text, with its place and unit."""
        made = super().__new__(cls, text)
        made.keys, made.unit = keys, unit
        return made


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
    for i, entry in enumerate(entries):
        for length, runs in entry["throughput"].items():
            for level in runs:
                at = (i, "throughput", length, level)
                rates = [
                    _number(entries, "{:.1f}", *at, key)
                    for key in ("output_tokens_per_s", "total_tokens_per_s")
                ]
                place = (i, "break_even", "ratios", length, level, "ratio")
                ratio = _number(entries, "{:.2f}x", *place) if "break_even" in entry else "–"
                row = [entry["name"], length, level, *_latencies(entries, *at), *rates, ratio]
                rows.append(row)
    return Grid(columns, rows, keys=3)


def rates_grid(entries: list[Entry]) -> Grid:
    """What arrived and what was answered per second, with its latencies."""
    columns = ["arrivals", "tokens in", "per s", "answered", "TTFT ms", "TPOT ms", "E2EL ms", "p99"]
    rows = []
    for i, entry in enumerate(entries):
        for length, runs in entry["rates"].items():
            for rate in runs:
                at = (i, "rates", length, rate)
                answered = _number(entries, "{:.2f}", *at, "requests_per_s")
                rows.append([entry["name"], length, rate, answered, *_latencies(entries, *at)])
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
    rows = [
        [entry["name"], *_memory(entries, i), *_share(entries, i)]
        for i, entry in enumerate(entries)
    ]
    return Grid(columns, rows)


def _spreads(group: list[Entry]) -> list[str]:
    """Lowest and highest ratio under each load, e.g. `0.85x to 0.96x with 1 in flight`."""
    every = [describe_loads(entry["break_even"]["ratios"]) for entry in group]
    ratios = {load: [loads[load]["ratio"] for loads in every] for load in every[0]}
    return [f"{min(all_):.2f}x to {max(all_):.2f}x with {n}" for n, all_ in ratios.items()]


def _join(words: list[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def _number(entries: list[Entry], form: str, *keys: str | int, unit: float = 1.0) -> str:
    """What stands at that place under `checkpoints`; a dash for null."""
    value: Any = entries
    for key in keys:
        value = value[key]
    if value is None:
        return "–"
    return Number(form.format(value / unit), ("checkpoints", *keys), unit)


def _latencies(entries: list[Entry], *at: str | int) -> list[str]:
    return [
        _number(entries, "{:.0f}", *at, "ttft_ms", "median"),
        _number(entries, "{:.1f}", *at, "tpot_ms", "median"),
        _number(entries, "{:.0f}", *at, "e2el_ms", "median"),
        _number(entries, "{:.0f}", *at, "e2el_ms", "p99"),
    ]


def _memory(entries: list[Entry], i: int) -> list[str]:
    return [
        _number(entries, "{:.2f}", i, "memory", "weights_bytes", unit=GIB),
        entries[i]["memory"]["weights_source"],
        _number(entries, "{:.2f}", i, "memory", "kv_cache_bytes", unit=GIB),
        _number(entries, "{:,.0f}", i, "memory", "kv_cache_tokens"),
    ]


def _share(entries: list[Entry], i: int) -> list[str]:
    if "share" not in entries[i]["bandwidth"]:
        return ["–", "–"]
    return [
        _number(entries, "{:.3f}", i, "bandwidth", "weights_bytes_per_token", unit=1e9),
        _number(entries, "{:.0f}%", i, "bandwidth", "share", unit=0.01),
    ]
