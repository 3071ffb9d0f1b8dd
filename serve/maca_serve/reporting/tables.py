"""Results as tables for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from maca_serve.evaluation.recovery import headline, recovered
from maca_serve.reporting.speed_view import Grid, speed_grids

Entry = dict[str, Any]
GAP = 2


def result_tables(results: dict[str, Any], width: int) -> Iterator[Table]:
    """What was measured: the checkpoints, their accuracy, their speed.

    Args:
        results: of a measurement.
        width: of the terminal, in characters; tables of speed are cut in parts that fit.
    """
    entries = results["checkpoints"]
    yield _checkpoints(entries)
    if "perplexity" in entries[0]:
        yield _perplexity(entries)
        if entries[0]["tasks"]:
            yield _tasks(entries)
        for name in entries[0]["probes"]:
            yield _probe(entries, name)
    if "throughput" in entries[0]:
        for grid in speed_grids(results):
            for columns in _parts(grid, width):
                table = _table(*(grid.columns[i] for i in columns))
                for row in grid.rows:
                    table.add_row(*(row[i] for i in columns))
                yield table


def _parts(grid: Grid, width: int) -> list[list[int]]:
    """Columns of each part of a grid: those that say what a row is, and as many more as fit."""
    lines = [grid.columns, *grid.rows]
    needed = [max(len(line[i]) for line in lines) + GAP for i in range(len(grid.columns))]
    keys = list(range(grid.keys))
    parts = [keys]
    for column in range(grid.keys, len(grid.columns)):
        if parts[-1] != keys and sum(needed[i] for i in [*parts[-1], column]) - GAP > width:
            parts.append(keys)
        parts[-1] = [*parts[-1], column]
    return parts


def _checkpoints(entries: list[Entry]) -> Table:
    table = _table("checkpoint", "scheme", "kernel", "MB")
    for entry in entries:
        size = f"{entry['size_bytes'] / 1e6:.0f}"
        table.add_row(entry["name"], entry["scheme"], entry["kernel"], size)
    return table


def _perplexity(entries: list[Entry]) -> Table:
    lengths = list(entries[0]["perplexity"])
    table = _table("perplexity at length", *lengths, *_if_compared(entries, "recovery"))
    for entry in entries:
        values = [entry["perplexity"][length] for length in lengths]
        cells = [f"{value['ppl']:.2f} ± {value['stderr']:.2f}" for value in values]
        table.add_row(entry["name"], *cells, *_recovery(entry, "perplexity"))
    return table


def _tasks(entries: list[Entry]) -> Table:
    names = list(entries[0]["tasks"])
    table = _table("task", *names, *_if_compared(entries, "recovery"))
    for entry in entries:
        cells = [_score(entry["tasks"][name]) for name in names]
        table.add_row(entry["name"], *cells, *_recovery(entry, "tasks"))
    return table


def _probe(entries: list[Entry], name: str) -> Table:
    """Log-probability of an answer's tokens, and the share of them that are the likeliest."""
    lengths = list(entries[0]["probes"][name])
    table = _table(f"{name}, nats (right)", *lengths, *_if_compared(entries, "recovery"))
    for entry in entries:
        values = [entry["probes"][name][length] for length in lengths]
        cells = [f"{value['logprob']:.2f} ({100 * value['right']:.0f} %)" for value in values]
        table.add_row(entry["name"], *cells, *_recovery(entry, "probes", name))
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        text = column in ("scheme", "kernel")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


def _if_compared(entries: list[Entry], title: str) -> list[str]:
    return [title] if "recovery" in entries[0] else []


def _recovery(entry: Entry, *path: str) -> list[str]:
    if "recovery" not in entry:
        return []
    kept, interval = recovered(entry, *path, "mean")
    if kept is None:
        return ["-"]
    if interval is None or interval[0] == interval[1]:
        return [f"{kept:.1f} %"]
    return [f"{kept:.1f} % ({interval[0]:.0f}-{interval[1]:.0f})"]


def _score(task: dict[str, Any]) -> str:
    score, error = headline(task)
    return f"{score:.3f}" + (f" ± {error:.3f}" if error is not None else "")
