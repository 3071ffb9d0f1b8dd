"""Write ACCURACY.md from the cells of the accuracy grid.

.venv-serve/bin/python benchmarks/accuracy_page.py     # that environment has scipy, matplotlib
"""

import json
import statistics
import sys
from collections import Counter, defaultdict
from itertools import product

import numpy as np
from accuracy_arms import (
    BASELINES,
    CONTEXTS,
    DEFAULT,
    EARLIER,
    EFFECTS,
    FORMER,
    HERE,
    LENGTHS,
    METHODS,
    SCHEMES,
    TARGETS,
    TOKENS,
    WINDOWS,
    read_cells,
    read_runs,
)
from accuracy_stats import (
    Cells,
    changes,
    holm,
    kl,
    mean_and_error,
    mean_log_kl,
    p_over_groups,
    paired_p,
    pairs_at,
    ratio_of_means,
    repeats,
    right,
    shared_seeds,
    window_interval,
    zero_shot,
)
from accuracy_targets import asked, target_rows
from matplotlib import pyplot
from matplotlib.lines import Line2D
from tables import markdown

pyplot.rcParams["svg.hashsalt"] = "accuracy"  # the same file from the same cells
PAGE = HERE / "ACCURACY.md"
PLOTS = HERE / "results"
TEXT = HERE / "accuracy_page.md"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def method_table(cells: Cells) -> str:
    """KL and perplexity by method and length, best first."""
    order = sorted(cells, key=lambda m: statistics.fmean(map(mean_log_kl, cells[m].values())))
    heads = [f"KL at {length}" for length in LENGTHS]
    heads += [f"perplexity at {length}" for length in LENGTHS]
    rows = [["method", "seeds", *heads, "minutes"]]
    base = next(iter(next(iter(cells.values())).values()))["base_perplexity"]
    rows.append(["base", "", *[""] * 3, *(f"{base[str(n)]['ppl']:.1f}" for n in LENGTHS), ""])
    for method in order:
        found = list(cells[method].values())
        perplexities = [[cell["perplexity"][str(n)]["ppl"] for cell in found] for n in LENGTHS]
        name = f"**{method}**" if method == DEFAULT else method
        row = [name, str(len(found)), *(spread([kl(c, n) for c in found]) for n in LENGTHS)]
        row += [spread(values, 1) for values in perplexities]
        minutes = statistics.median(c["wall_seconds"]["calibrate"] for c in found) / 60
        rows.append([*row, f"{minutes:.1f}"])
    return markdown(rows)


def comparison_rows(model: str, scheme: str, cells: Cells) -> list[dict]:
    """The default against each baseline at each length."""
    rows = []
    for baseline in BASELINES:
        seeds = shared_seeds(cells, DEFAULT, baseline)
        for length in LENGTHS if seeds else ():
            own, other = ([cells[m][s] for s in seeds] for m in (DEFAULT, baseline))
            pairs = pairs_at(cells, DEFAULT, baseline, length)
            rows.append(
                {
                    "of": (model, scheme, baseline, length),
                    "seeds": len(seeds),
                    "ratio": ratio_of_means(pairs),
                    "interval": window_interval(own, other, length),
                    "p": paired_p(pairs),
                }
            )
    return rows


def comparison_table(rows: list[dict]) -> str:
    """The default against baselines."""
    lines = [["model", "scheme", "against", "at", "seeds", "KL ratio", "over windows", "p (Holm)"]]
    for row in rows:
        (low, high), p = row["interval"], row["p"]
        cells = [*map(str, row["of"]), str(row["seeds"]), f"{row['ratio']:.2f}"]
        lines.append([*cells, f"{low:.2f} to {high:.2f}", "—" if p is None else f"{p:.1g}"])
    return markdown(lines)


def context_table(groups: dict[tuple[str, str], Cells]) -> str:
    """KL at inputs shorter and longer than the others, and the default's over the baseline's."""
    heads = [f"KL at {length}" for length in CONTEXTS.lengths]
    rows = [["model, scheme", "method", "seeds", *heads]]
    for key, cells in groups.items():
        own = DEFAULT if DEFAULT in cells else FORMER
        for method in [m for m in (*BASELINES, own) if m in cells]:
            found = list(cells[method].values())
            values = [spread([kl(cell, n) for cell in found]) for n in CONTEXTS.lengths]
            rows.append([", ".join(key), method, str(len(found)), *values])
        for method in [m for m in BASELINES if shared_seeds(cells, own, m)]:
            pairs = [pairs_at(cells, own, method, n) for n in CONTEXTS.lengths]
            ratios = [f"{ratio_of_means(pair):.2f}" for pair in pairs]
            rows.append([", ".join(key), f"{own} / {method}", str(len(pairs[0])), *ratios])
    return markdown(rows) if len(rows) > 1 else "Not measured yet."


def effect_table(groups: dict[tuple[str, str], Cells]) -> str:
    """What each ingredient does alone: KL with it over KL without, all else alike."""
    found = [
        (effect, by_group)
        for effect in EFFECTS
        if (by_group := [x for cells in groups.values() if (x := changes(cells, *effect[1:]))])
    ]
    corrected = holm([p_over_groups(by_group) for _, by_group in found])
    heads = ["what is changed", "from", "to", "KL ratio", "cells", "models x schemes"]
    rows = [[*heads, "lowest to highest", "p (Holm)"]]
    for (effect, by_group), p in zip(found, corrected, strict=True):
        each = [change for group in by_group for change in group]
        low, high = np.exp(min(each)), np.exp(max(each))
        counts = [str(len(each)), str(len(by_group))]
        row = [*effect, f"{np.exp(statistics.fmean(each)):.2f}", *counts]
        rows.append([*row, f"{low:.2f} to {high:.2f}", "—" if p is None else f"{p:.1g}"])
    return markdown(rows)


def zero_shot_table(groups: dict[tuple[str, str], Cells]) -> str:
    """Accuracy by task, in percent, seeds averaged; errors are over questions."""
    rows: list[list[str]] = []
    for (model, scheme), cells in groups.items():
        for method in [m for m in (*BASELINES, DEFAULT, FORMER) if asked(cells, m)]:
            found = [cells[method][seed] for seed in asked(cells, method)]
            names = list(found[0]["tasks"])
            base = [right(found[0]["base_tasks"], name) for name in names]
            for what, count, values in (
                (f"{model}, base", "", base),
                (f"{model}, {scheme}, {method}", str(len(found)), zero_shot(found)),
            ):
                mean, error = mean_and_error(values)
                row = [what, count, *(f"{100 * v.mean():.1f}" for v in values)]
                row += [f"{mean:.1f} ± {error:.1f}"]
                rows += [row] if row not in rows else []
    if not rows:
        return "Not measured yet."
    return markdown([["checkpoint", "seeds", *names, "mean"], *rows])


def sink_table() -> str:
    """What quantization does to the first token and to the others, after the middle layer."""
    found = json.loads((HERE / "results" / "sink_errors.json").read_text())["layers"]
    head = ["model", "method", "norm of the first token", "its error", "error of the others"]
    rows = []
    for model, methods in found.items():
        for method, layers in methods.items():
            middle = layers[len(layers) // 2]
            rows.append([model, method, f"{middle['norm_first']:.2f}"])
            rows[-1] += [f"{middle[key]:.2g}" for key in ("error_first", "error_others")]
    return markdown([head, *rows])


def sensitivity_table() -> str:
    """What an error at the first token costs against one at any other, by kind of module."""
    found = json.loads((HERE / "results" / "sink_sensitivity.json").read_text())["models"]
    kinds = list(next(iter(found.values()))["first_over_mean"])
    rows = [["model", *kinds]]
    for model, measured in found.items():
        thirds = [measured["first_over_mean"][kind] for kind in kinds]
        rows.append([model, *(" / ".join(sensitivity(x) for x in three) for three in thirds)])
    return markdown(rows)


def sensitivity(ratio: float) -> str:
    """Two digits of a ratio, which may be nothing but rounding errors."""
    return "0" if ratio < 1e-3 else f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def scale_table() -> str:
    """What scales are best chosen by, in single layers."""
    found = json.loads((HERE / "results" / "scale_costs.json").read_text())["ratios"]
    names = list(next(iter(found.values())))
    rows = [[name, *(f"{ratios[name]:.2f}" for ratios in found.values())] for name in names]
    return markdown([["scales chosen by", *found], *rows])


def plot(groups: dict[tuple[str, str], Cells]) -> str:
    """KL by input length of the default and the baselines; the name of the picture."""
    colours = {method: f"C{number}" for number, method in enumerate([*BASELINES, DEFAULT])}
    models = list(dict.fromkeys(model for model, _ in groups))
    figure, axes = pyplot.subplots(
        len(models),
        len(SCHEMES),
        figsize=(3.2 * len(SCHEMES), 3 * len(models) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, (model, scheme) in zip(axes.flat, product(models, SCHEMES), strict=True):
        cells = groups.get((model, scheme), {})
        if not cells:
            axis.set_axis_off()
            continue
        for method, colour in colours.items():
            found = list(cells.get(method, {}).values())
            if found:
                values = np.array([[kl(cell, length) for length in LENGTHS] for cell in found])
                error = values.std(0, ddof=1) if len(found) > 1 else None
                axis.errorbar(LENGTHS, values.mean(0), error, color=colour, marker="o", capsize=3)
        axis.set(xscale="log", title=f"{model}\n{scheme}", xlabel="input length", ylim=(0, None))
        axis.set_xticks(LENGTHS, map(str, LENGTHS))
        axis.minorticks_off()
    figure.supylabel("KL to the base, nats per token")
    lines = [Line2D([], [], color=colour, marker="o") for colour in colours.values()]
    figure.legend(lines, colours, loc="outside lower center", ncols=len(lines))
    figure.savefig(PLOTS / "accuracy.svg", metadata={"Date": None})
    return "results/accuracy.svg"


def method_list(cells: list[dict]) -> str:
    """What each method is, and how many tokens it took of its budget."""
    rows = [["method", "fields", "calibration data", "tokens"]]
    for name, (fields, data) in {**METHODS, **EARLIER}.items():
        if took := {cell["tokens"] for cell in cells if cell["method"] == name}:
            shown = [", ".join(f"{k}: {v}" for k, v in part.items()) for part in (fields, data)]
            tokens = " to ".join(f"{n:,}" for n in sorted({min(took), max(took)}))
            rows.append([name, shown[0] or "defaults", shown[1], tokens])
    return markdown(rows)


def grouped(cells: list[dict]) -> dict[tuple[str, str], Cells]:
    """Cells by model and scheme."""
    groups: dict[tuple[str, str], Cells] = {}
    for cell in sorted(cells, key=lambda c: (c["model"], list(SCHEMES).index(c["scheme"]))):
        group = groups.setdefault((cell["model"], cell["scheme"]), defaultdict(dict))
        group[cell["method"]][cell["seed"]] = cell
    return groups


def machines(cells: list[dict]) -> str:
    """What the cells ran on; the same method differs a little from one processor to another."""
    ran = Counter(f"{c['machine']['processor']}, {c['machine']['cores']} cores" for c in cells)
    return "; ".join(f"{name} ({count} cells)" for name, count in ran.most_common())


def mixed_pairs(groups: dict[tuple[str, str], Cells]) -> str:
    """How many of the pairs that are compared ran on two kinds of processor."""
    differ = [
        cells[DEFAULT][seed]["machine"]["processor"] != cells[method][seed]["machine"]["processor"]
        for cells in groups.values()
        for method in BASELINES
        for seed in shared_seeds(cells, DEFAULT, method)
    ]
    return f"{sum(differ)} of the {len(differ)}"


def run_again() -> str:
    """How far cells that were run a second time lie from their first run."""
    found = repeats(read_runs())
    if not found:
        return "none was run again on another one"
    single = [ratio for ratios in found for ratio in ratios]
    means = [statistics.geometric_mean(ratios) for ratios in found]
    return (
        f"{len(found)} cells that were run again on another one (for their answers; their KL here"
        f" is the\n  first run's) have {min(single):.2f} to {max(single):.2f} of their KL at single"
        f" lengths, {min(means):.2f} to {max(means):.2f} in the mean over lengths"
    )


def main() -> None:
    """Write the page."""
    cells = read_cells()
    if not cells:
        sys.exit("no cells yet: run accuracy.py first")
    groups = grouped(cells)
    compared = [row for key, found in groups.items() for row in comparison_rows(*key, found)]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p"] = p
    parts = [
        TEXT.read_text().format(
            tokens=TOKENS,
            windows=WINDOWS,
            targets=TARGETS,
            cells=len(cells),
            default=DEFAULT,
            plot=plot(groups),
            machines=machines(cells),
            mixed_pairs=mixed_pairs(groups),
            run_again=run_again(),
            comparison=comparison_table(compared) if compared else "No cells yet.",
            contexts=context_table(grouped(read_cells(CONTEXTS))),
            context_targets=CONTEXTS.targets,
            effects=effect_table(groups),
            targets_reached=markdown(target_rows(groups, compared)),
            zero_shot=zero_shot_table(groups),
            scales=scale_table(),
            sink=sink_table(),
            sensitivity=sensitivity_table(),
            methods=method_list(cells),
        ),
        *(
            f"## {model}, {scheme}\n\n{method_table(group)}"
            for (model, scheme), group in groups.items()
        ),
    ]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
