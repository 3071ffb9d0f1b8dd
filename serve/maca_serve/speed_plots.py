"""Plots of speed, as SVG to stand inside a page."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from maca_serve.breakeven import MARGIN
from maca_serve.plots import BASE_COLOUR, STYLE, colour, to_svg

Entry = dict[str, Any]
Draw = Callable[[Axes, str], None]


def curve_plot(entries: list[Entry]) -> str:
    """Output tokens per second against mean TPOT, a point per number of requests in flight."""

    def draw(axes: Axes, length: str) -> None:
        for index, entry in enumerate(entries):
            runs = entry["throughput"][length]
            x = [run["tpot_ms"]["mean"] for run in runs.values()]
            y = [run["output_tokens_per_s"] for run in runs.values()]
            axes.plot(x, y, marker="o", color=colour(index), label=entry["name"])
            for level, *place in zip(runs, x, y, strict=True):
                axes.annotate(level, place, xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.set_xlabel("mean time per output token, ms (left is better)")
        axes.set_ylabel("output tokens per second (up is better)")
        axes.margins(0.12)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return _by_length(entries, entries[0]["throughput"], draw, "curve")


def ratio_plot(entries: list[Entry]) -> str:
    """Ratio of output tokens per second to the base's by requests in flight; a bar spans rounds."""
    levels = [int(level) for level in next(iter(entries[0]["throughput"].values()))]

    def draw(axes: Axes, length: str) -> None:
        axes.axhspan(1 - MARGIN, 1 + MARGIN, color=BASE_COLOUR, alpha=0.15, linewidth=0)
        axes.axhline(1, color=BASE_COLOUR, linestyle="--", label=entries[0]["name"])
        for index, entry in enumerate(entries[1:], start=1):
            found = entry["break_even"]["ratios"][length].values()
            middle = [one["ratio"] for one in found]
            down = [one["ratio"] - min(one["rounds"]) for one in found]
            up = [max(one["rounds"]) - one["ratio"] for one in found]
            look = {"marker": "o", "capsize": 3, "color": colour(index), "label": entry["name"]}
            axes.errorbar(levels, middle, yerr=[down, up], **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, list(map(str, levels)))
        axes.minorticks_off()
        axes.set_xlabel("requests in flight")
        axes.set_ylabel("output tokens/s, ratio to the base")
        axes.set_ylim(bottom=0)

    return _by_length(entries, entries[0]["throughput"], draw, "ratio")


def rates_plot(entries: list[Entry]) -> str:
    """End-to-end latency against arrivals per second: solid the median, dotted P99."""

    def draw(axes: Axes, length: str) -> None:
        for index, entry in enumerate(entries):
            runs = entry["rates"][length]
            x = [float(rate) for rate in runs]
            for name, line in {"median": "-", "p99": ":"}.items():
                y = [run["e2el_ms"][name] / 1000 for run in runs.values()]
                label = entry["name"] if name == "median" else None
                axes.plot(x, y, line, marker="o", color=colour(index), label=label)
        axes.set_xlabel("requests arriving per second")
        axes.set_ylabel("end to end, s (median; dotted: P99)")
        axes.set_ylim(bottom=0)

    return _by_length(entries, entries[0]["rates"], draw, "rates")


def _by_length(entries: list[Entry], lengths: Entry, draw: Draw, name: str) -> str:
    """A panel for every prompt length, under one legend."""
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(
            1, len(lengths), figsize=(5.2 * len(lengths), 3.4), squeeze=False
        )
        for axes, length in zip(row[0], lengths, strict=True):
            draw(axes, length)
            axes.set_title(f"prompts of {length} tokens", fontsize=9.5)
        handles = row[0][0].get_legend_handles_labels()
        columns = min(len(entries), 2 * len(lengths))
        figure.legend(*handles, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, 0.0))
        figure.tight_layout()
    return to_svg(figure, name)
