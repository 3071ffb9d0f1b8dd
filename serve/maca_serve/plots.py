"""Plots of results, as SVG to stand inside a page."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maca_serve.recovery import headline

Entry = dict[str, Any]
# Okabe and Ito's colours, told apart also by the colour-blind; grey for the base.
BASE_COLOUR = "#666666"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def colour(index: int) -> str:
    """Colour of the checkpoint at this place; the base is at 0."""
    return BASE_COLOUR if index == 0 else COLOURS[(index - 1) % len(COLOURS)]


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element whose ids are its own on a page with others."""
    buffer = io.StringIO()
    with plt.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    # Without the XML prologue; the page says what the picture shows.
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def perplexity_plot(entries: list[Entry]) -> str:
    """Perplexity against input length, with one standard error either way."""

    def draw(axes: Axes) -> None:
        for index, entry in enumerate(entries):
            points = entry["perplexity"].values()
            axes.errorbar(
                _lengths(entry),
                [point["ppl"] for point in points],
                yerr=[point["stderr"] for point in points],
                marker="o",
                capsize=3,
                color=colour(index),
                label=entry["name"],
            )
        axes.set_ylabel("perplexity (lower is better)")
        _length_axis(axes, entries[0])

    return _single(draw, "perplexity")


def recovery_plot(entries: list[Entry]) -> str:
    """Recovery of perplexity by input length, in percent of the base."""

    def draw(axes: Axes) -> None:
        axes.axhline(100, color=BASE_COLOUR, linestyle="--", label=entries[0]["name"])
        for index, entry in enumerate(entries[1:], start=1):
            kept = [entry["recovery"]["perplexity"][str(length)] for length in _lengths(entry)]
            axes.plot(_lengths(entry), kept, marker="o", color=colour(index), label=entry["name"])
        axes.set_ylabel("perplexity recovery, % of base")
        _length_axis(axes, entries[0])

    return _single(draw, "recovery")


def tasks_plot(entries: list[Entry]) -> str:
    """Headline metric of every task, with one standard error either way."""
    names = list(entries[0]["tasks"])

    def draw(axes: Axes) -> None:
        for index, entry in enumerate(entries):
            scores = [headline(entry["tasks"][name]) for name in names]
            errors = [error or 0.0 for _, error in scores]
            _bars(axes, entries, index, [score for score, _ in scores], errors)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("score (higher is better)")
        axes.margins(y=0.35)  # room for the legend

    return _single(draw, "tasks")


def size_plot(entries: list[Entry]) -> str:
    """Bytes of the weight files."""

    def draw(axes: Axes) -> None:
        for index, entry in enumerate(entries):
            size = entry["size_bytes"] / 1e6
            axes.barh(index, size, color=colour(index), height=0.6)
            axes.annotate(
                f" {size:.0f} MB",
                (size, index),
                va="center",
                xytext=(2, 0),
                textcoords="offset points",
            )
        axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("weights on disk, MB")
        axes.margins(x=0.18)

    return _single(draw, "size", legend=False, height=0.5 + 0.45 * len(entries))


def _single(
    draw: Callable[[Axes], None], name: str, *, legend: bool = True, height: float = 3.4
) -> str:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, height))
        draw(axes)
        if legend:
            axes.legend(fontsize=8.5)
    return to_svg(figure, name)


def _bars(
    axes: Axes,
    entries: list[Entry],
    index: int,
    values: list[float],
    errors: list[float] | None = None,
) -> None:
    width = 0.8 / len(entries)
    places = [x - 0.4 + (index + 0.5) * width for x in range(len(values))]
    label = entries[index]["name"]
    axes.bar(places, values, width, yerr=errors, capsize=2, color=colour(index), label=label)
    axes.grid(axis="x", visible=False)


def _lengths(entry: Entry) -> list[int]:
    return [int(length) for length in entry["perplexity"]]


def _length_axis(axes: Axes, entry: Entry) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(_lengths(entry), [str(length) for length in _lengths(entry)])
    axes.minorticks_off()
    axes.set_xlabel("input length, tokens")
