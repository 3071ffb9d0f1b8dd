"""Plots of speed, as SVG to stand inside a page: one for each question and prompt length."""

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from maca_serve.reporting.plots import BASE_COLOUR, STYLE, colour, marker, to_svg
from maca_serve.speed.breakeven import MARGIN

Entry = dict[str, Any]
CURVE = (
    "Output tokens per second against time per token; numbers at the points: requests in flight."
)
RATIO = (
    "Ratio to the base; bars: from the lowest round to the highest; grey: within"
    f" {100 * MARGIN:g} %."
)
RATES = "Requests arrive at random at these rates, whether the engine keeps up or not."


def speed_figures(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """Figures with their captions: for every prompt length a curve, ratios, and rates if asked for.

    Args:
        entries: checkpoints of results, the base first.
    """
    plots = {CURVE: _curve, RATIO: _ratios}
    if "rates" in entries[0]:
        plots[RATES] = _rates
    for length in entries[0]["throughput"]:
        for caption, draw in plots.items():
            with plt.rc_context(STYLE):
                figure, axes = plt.subplots(figsize=(5.2, 3.4))
                draw(axes, entries, length)
                axes.set_ylim(bottom=0)
                axes.set_title(f"prompts of {length} tokens", fontsize=9.5)
                # Below the axes, where no point can lie.
                axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
            yield to_svg(figure, f"speed-{length}-{draw.__name__}"), caption


def _curve(axes: Axes, entries: list[Entry], length: str) -> None:
    for index, entry in enumerate(entries):
        runs = entry["throughput"][length]
        x = [run["tpot_ms"]["mean"] for run in runs.values()]
        y = [run["output_tokens_per_s"] for run in runs.values()]
        axes.plot(x, y, marker=marker(index), color=colour(index), label=entry["name"])
        for level, *place in zip(runs, x, y, strict=True):
            axes.annotate(level, place, xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("mean time per output token, ms (left is better)")
    axes.set_ylabel("output tokens per second (up is better)")
    axes.margins(0.12)
    axes.set_xlim(left=0)


def _ratios(axes: Axes, entries: list[Entry], length: str) -> None:
    levels = [int(level) for level in entries[0]["throughput"][length]]
    axes.axhspan(1 - MARGIN, 1 + MARGIN, color=BASE_COLOUR, alpha=0.15, linewidth=0)
    axes.axhline(1, color=BASE_COLOUR, linestyle="--", label=entries[0]["name"])
    for index, entry in enumerate(entries[1:], start=1):
        found = entry["break_even"]["ratios"][length].values()
        middle = [one["ratio"] for one in found]
        down = [one["ratio"] - min(one["rounds"]) for one in found]
        up = [max(one["rounds"]) - one["ratio"] for one in found]
        look: dict[str, Any] = {"marker": marker(index), "capsize": 3, "color": colour(index)}
        axes.errorbar(levels, middle, yerr=[down, up], label=entry["name"], **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, list(map(str, levels)))
    axes.minorticks_off()
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("output tokens/s, ratio to the base")


def _rates(axes: Axes, entries: list[Entry], length: str) -> None:
    for index, entry in enumerate(entries):
        runs = entry["rates"][length]
        x = [float(rate) for rate in runs]
        for name, line in {"median": "-", "p99": ":"}.items():
            y = [run["e2el_ms"][name] / 1000 for run in runs.values()]
            label = entry["name"] if name == "median" else None
            axes.plot(x, y, line, marker=marker(index), color=colour(index), label=label)
    axes.set_xlabel("requests arriving per second")
    axes.set_ylabel("end to end, s (median; dotted: P99)")
