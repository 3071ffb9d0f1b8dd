"""Plots of results, as SVG to stand inside a page."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maca_serve.evaluation.recovery import headline

Entry = dict[str, Any]
# Text, ticks and axes take the colour of the text around the plot, light or dark.
INK = "#1d1d1f"
GRID = "#e4e4e4"
# Okabe and Ito's colours, told apart also by the colour-blind; grey for the base.
BASE_COLOUR = "#666666"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^DvP"
# The page sets these variables for light and dark; a picture by itself has the colours above.
ADAPTIVE = {
    INK: "currentColor",
    GRID: f"var(--grid, {GRID})",
    BASE_COLOUR: f"var(--base, {BASE_COLOUR})",
    **{plain: f"var(--series-{i}, {plain})" for i, plain in enumerate(COLOURS, start=1)},
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def colour(index: int) -> str:
    """Colour of the checkpoint at this place; the base is at 0."""
    return BASE_COLOUR if index == 0 else COLOURS[(index - 1) % len(COLOURS)]


def marker(index: int) -> str:
    """Marker of the checkpoint at this place: colours alone do not tell everyone."""
    return "o" if index == 0 else MARKERS[index % len(MARKERS)]


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element whose ids are its own on a page with others."""
    buffer = io.StringIO()
    with plt.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    for plain, adaptive in ADAPTIVE.items():
        text = text.replace(f": {plain}", f": {adaptive}")
    # Without the XML prologue; the page says what the picture shows.
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def perplexity_plot(entries: list[Entry]) -> str:
    """Perplexity against input length, with one standard error either way."""

    def draw(axes: Axes) -> None:
        _lines(axes, entries, [entry["perplexity"] for entry in entries], "ppl", "stderr")
        axes.set_ylabel("perplexity (lower is better)")
        _length_axis(axes, entries[0])

    return _single(draw, "perplexity")


def recovery_plot(entries: list[Entry], threshold: float) -> str:
    """Recovery of perplexity by input length, in percent of the base, with its intervals."""

    def draw(axes: Axes) -> None:
        axes.axhline(100, color=BASE_COLOUR, linestyle="--", label=entries[0]["name"])
        axes.axhline(threshold, color=INK, linestyle=":", linewidth=1, label=f"{threshold:g} %")
        for index, entry in enumerate(entries[1:], start=1):
            kept, intervals = entry["recovery"], entry["recovery"]["intervals"]
            lengths = [str(length) for length in _lengths(entry)]
            values = [kept["perplexity"][length] for length in lengths]
            errors = _errors(values, [intervals["perplexity"][length] for length in lengths])
            _line(axes, entries, index, values, errors)
        axes.set_ylabel("perplexity recovery, % of base")
        _length_axis(axes, entries[0])

    return _single(draw, "recovery")


def probe_plot(entries: list[Entry], name: str) -> str:
    """A probe's mean log-probability against input length, with one standard error either way."""

    def draw(axes: Axes) -> None:
        found = [entry["probes"][name] for entry in entries]
        _lines(axes, entries, found, "logprob", "logprob_stderr")
        axes.set_ylabel("log-probability per token, nats")
        axes.set_title(f"{name} (higher is better)", fontsize=9.5)
        _length_axis(axes, entries[0])

    return _single(draw, f"probe {name}")


def tasks_plot(entries: list[Entry]) -> str:
    """Headline metric of every task, with one standard error either way."""
    names = list(entries[0]["tasks"])

    def draw(axes: Axes) -> None:
        for index, entry in enumerate(entries):
            scores = [headline(entry["tasks"][name]) for name in names]
            axes.errorbar(
                [score for score, _ in scores],
                [place + _offset(entries, index) for place in range(len(names))],
                xerr=[error or 0.0 for _, error in scores],
                linestyle="none",
                marker=marker(index),
                capsize=3,
                color=colour(index),
                label=entry["name"],
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("score")

    return _single(draw, "tasks", height=1.3 + len(names) * max(0.4, 0.16 * len(entries)))


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
        figure, axes = plt.subplots(figsize=(5.2, height), layout="constrained")
        draw(axes)
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            columns = max(1, min(len(labels), 50 // (4 + max(map(len, labels)))))
            # Below the axes, where it hides nothing.
            figure.legend(handles, labels, fontsize=8.5, loc="outside lower center", ncols=columns)
    return to_svg(figure, name)


def _lines(
    axes: Axes, entries: list[Entry], found: list[dict[str, Entry]], value: str, error: str
) -> None:
    """A line for each entry through what was found by length, `error` either way of `value`."""
    for index, points in enumerate(found):
        values = [point[value] for point in points.values()]
        _line(axes, entries, index, values, [point[error] for point in points.values()])


def _line(axes: Axes, entries: list[Entry], index: int, values: list[float], errors: Any) -> None:
    # Moved apart a little, so that error bars do not hide each other.
    lengths = [length * 2 ** (0.15 * _offset(entries, index)) for length in _lengths(entries[0])]
    axes.errorbar(
        lengths,
        values,
        yerr=errors,
        marker=marker(index),
        capsize=3,
        color=colour(index),
        label=entries[index]["name"],
    )


def _errors(values: list[float], intervals: list[list[float]]) -> list[list[float]]:
    """Distances below and above, as matplotlib takes them."""
    pairs = list(zip(values, intervals, strict=True))
    return [
        [value - low for value, (low, _) in pairs],
        [high - value for value, (_, high) in pairs],
    ]


def _offset(entries: list[Entry], index: int) -> float:
    """A place between -0.4 and 0.4."""
    return 0.8 * ((index + 0.5) / len(entries) - 0.5)


def _lengths(entry: Entry) -> list[int]:
    return [int(length) for length in entry["perplexity"]]


def _length_axis(axes: Axes, entry: Entry) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(_lengths(entry), [str(length) for length in _lengths(entry)])
    axes.minorticks_off()
    axes.set_xlabel("input length, tokens")
