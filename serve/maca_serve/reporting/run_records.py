"""What the quantize side left in a checkpoint folder: the run, its losses, its Hessian diagonals.

All of it is optional: checkpoints made by others have none.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from maca_serve.formats.checkpoint import Checkpoint
from maca_serve.reporting.plots import STYLE, colour, to_svg

# A channel counts as one whose importance depends on length from this ratio on.
NOTABLE_RATIO = 1.5
# Colours saturate at a factor of two either way.
LIMIT_LOG2 = 1.0
# Wide inputs are averaged over neighbours, after sorting, to this many columns.
MAX_COLUMNS = 400

_LAYER = re.compile(r"\blayers\.(\d+)\.(?:.*\.)?(\w+)$")


@dataclass(frozen=True)
class DiagonalView:
    """One module's Hessian diagonals by length.

    Attributes:
        module: its name.
        svg: the heat map.
        share: percent of input channels whose share of the diagonal differs by NOTABLE_RATIO or
            more between two of the lengths.
        channels: how many input channels it has.
    """

    module: str
    svg: str
    share: float
    channels: int


def run_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run record says, as (label, text), without what it does not say."""
    calibration = record.get("calibration") or {}
    lengths = calibration.get("lengths") or {}
    seconds = record.get("wall_seconds") or {}
    rows = {
        "base model": record.get("base_model"),
        "licence": record.get("license"),
        "scheme": record.get("scheme"),
        "container": _suffixed(record.get("container_bits"), " bits"),
        "method": record.get("method"),
        "calibration text": calibration.get("source"),
        "calibration tokens": _thousands(calibration.get("tokens")),
        "sequences by length": ", ".join(f"{count} x {size}" for size, count in lengths.items()),
        "seed": record.get("seed"),
        "wall time": ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()),
        "tuned": _tuned(record.get("tuning") or {}),
        "peak memory": _gigabytes(record.get("peak_rss_bytes")),
        "peak device memory": _gigabytes(record.get("peak_device_bytes")),
    }
    return [(label, str(value)) for label, value in rows.items() if value not in (None, "")]


def losses_plot(checkpoints: list[Checkpoint]) -> str | None:
    """Loss of every module by layer, a panel for each kind of module; None without records."""
    panels: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for index, checkpoint in enumerate(checkpoints):
        for module in checkpoint.run_record.get("modules") or []:
            match = _LAYER.search(module["name"])
            if match and module["loss"] > 0:
                panels[match[2]][index].append((int(match[1]), module["loss"]))
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(2.7 * columns, 2.1 * rows + 0.3), squeeze=False, sharex=True
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (kind, lines) in zip(grid.flat, panels.items(), strict=False):
            for index, points in lines.items():
                layers, losses = zip(*sorted(points), strict=True)
                name = checkpoints[index].name
                axes.plot(layers, losses, ".-", ms=4, lw=1, color=colour(index), label=name)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(kind, fontsize=9.5)
        figure.supxlabel("layer", fontsize=9.5)
        figure.supylabel("loss", fontsize=9.5)
        shown = {label: line for axes in grid.flat for line, label in _legend(axes)}
        figure.legend(
            shown.values(),
            shown.keys(),
            loc="upper center",
            ncols=len(shown),
            bbox_to_anchor=(0.5, 0.0),
        )
        figure.tight_layout()
    return to_svg(figure, "losses")


def tuning_plot(checkpoint: Checkpoint) -> str | None:
    """What tuning did: layers' errors, and KL by length on held-out windows; None without it."""
    tuning = checkpoint.run_record.get("tuning") or {}
    layers, looks = tuning.get("layers") or [], tuning.get("held_out_kl") or []
    if not layers and not looks:
        return None
    panels = bool(layers) + bool(looks)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, panels, figsize=(3.6 * panels, 2.6), squeeze=False)
        axes = list(grid.flat)
        if layers:
            ratios = [layer["after"] / layer["before"] for layer in layers]
            axes[0].plot(range(len(ratios)), ratios, ".-", ms=4, lw=1, color=colour(1))
            axes[0].set_xlabel("layer")
            axes[0].set_ylabel("error after by error before")
            axes[0].set_ylim(bottom=0)
        if looks:
            for index, length in enumerate(sorted(looks[0], key=int), start=1):
                kl = [look[length] for look in looks]
                axes[-1].plot(kl, ".-", ms=4, lw=1, color=colour(index), label=f"{length} tokens")
            axes[-1].set_xlabel("look, the start first")
            axes[-1].set_ylabel("KL to the base, nats a token")
            axes[-1].set_ylim(bottom=0)
            axes[-1].legend()
        figure.tight_layout()
    return to_svg(figure, f"{checkpoint.name} tuning")


def diagonal_views(checkpoint: Checkpoint) -> list[DiagonalView]:
    """A heat map for each module whose Hessian diagonals were kept at two or more lengths."""
    modules = checkpoint.diagonals.get("modules") or {}
    views = []
    for module, by_length in modules.items():
        lengths = sorted(by_length, key=int)
        if len(lengths) < 2:
            continue
        relative = relative_diagonals([by_length[length] for length in lengths])
        spread = relative.max(axis=0) - relative.min(axis=0)
        share = 100.0 * float(np.mean(spread >= np.log2(NOTABLE_RATIO)))
        svg = _heat_map(relative, lengths, f"{checkpoint.name} {module}")
        views.append(DiagonalView(module, svg, share, relative.shape[1]))
    return views


def relative_diagonals(diagonals: list[list[float]]) -> NDArray[np.float64]:
    """log2 of each length's diagonal relative to the geometric mean over lengths.

    Each length is first divided by its own geometric mean over channels: an overall factor
    cancels in GPTQ, whose dampening is relative to the mean diagonal.

    Args:
        diagonals: one per length, each over the same input channels.

    Returns:
        lengths x channels; 0 everywhere where length makes no difference.
    """
    values = np.asarray(diagonals, dtype=np.float64)
    # Channels that were never active would be minus infinity.
    logs = np.log2(np.maximum(values, np.finfo(np.float32).tiny))
    logs -= logs.mean(axis=1, keepdims=True)
    centred: NDArray[np.float64] = logs - logs.mean(axis=0, keepdims=True)
    return centred


def _heat_map(relative: NDArray[np.float64], lengths: list[str], name: str) -> str:
    # Sorted by how the longest input differs from the shortest: a gradient, not noise.
    order = np.argsort(relative[-1] - relative[0])
    columns = np.array_split(relative[:, order], min(MAX_COLUMNS, relative.shape[1]), axis=1)
    image = np.stack([block.mean(axis=1) for block in columns], axis=1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(6.2, 0.7 + 0.3 * len(lengths)))
        shown = axes.imshow(
            image,
            aspect="auto",
            cmap="RdBu_r",
            vmin=-LIMIT_LOG2,
            vmax=LIMIT_LOG2,
            interpolation="nearest",
        )
        axes.set_yticks(range(len(lengths)), lengths)
        axes.set_xticks([])
        axes.set_ylabel("tokens")
        axes.set_xlabel("input channels, sorted")
        bar = figure.colorbar(shown, ax=axes, ticks=[-1, 0, 1], pad=0.02)
        bar.ax.set_yticklabels(["half", "equal", "double"])
    return to_svg(figure, name)


def _legend(axes: Any) -> list[tuple[Any, str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(handles, labels, strict=True))


def _tuned(tuning: dict[str, Any]) -> str | None:
    stages = [("blocks", "blocks"), ("end to end", "end_to_end")]
    done = [words for words, key in stages if tuning.get(key)]
    seconds = sum((tuning.get("wall_seconds") or {}).values())
    tokens = (tuning.get("calibration") or {}).get("tokens")
    return f"{', '.join(done)}; {tokens:,} tokens, {seconds:.0f} s" if done and tokens else None


def _suffixed(value: Any, suffix: str) -> str | None:
    return f"{value}{suffix}" if value is not None else None


def _thousands(value: int | None) -> str | None:
    return f"{value:,}" if value is not None else None


def _gigabytes(value: int | None) -> str | None:
    return f"{value / 1e9:.2f} GB" if value is not None else None
