"""Write BOARD.md from the cells of ``tuning.py --test`` and ``board.py``.

.venv/bin/python benchmarks/board_page.py
"""

import math
import statistics
from collections import defaultdict
from typing import Any

import board
import tuning
from accuracy_arms import HERE, LENGTHS, SCHEMES
from tables import markdown
from tuning_page import kl

PAGE = HERE / "BOARD.md"
TEXT = HERE / "board_page.md"
Cell = dict[str, Any]

ROWS = {
    # arm of tuning.py: what it is called here, and whether it is ours
    "nearest": ("round to nearest, min-max", False),
    "nearest-mse": ("round to nearest, least squared error", False),
    "awq": ("AWQ (llm-compressor), windows of 512", False),
    "stock": ("GPTQ (llm-compressor), windows of 2048", False),
    "stock-512": ("GPTQ (llm-compressor), windows of 512", False),
    "paper": ("MaCa as we read the paper, min-max scales", True),
    "ours": ("**our default**", True),
    "light": ("**ours, `--tune light`**", True),
    "both": ("**ours, `--tune full`**", True),
}
RIVALS = {
    "autoround-light": "AutoRound 0.16.1, light (50 iterations)",
    "autoround": "AutoRound 0.16.1, default (200 iterations)",
}


def bits_a_weight(scheme: str) -> float:
    """Of a quantized Linear with all that belongs to it: codes, 16-bit scales, zero points."""
    weights = SCHEMES[scheme]
    bits = int(weights["num_bits"])
    if weights["strategy"] == "channel":
        return float(bits)  # a scale for each row of hundreds of weights
    extra = 16 + (0 if weights["symmetric"] else bits)
    return bits + extra / int(weights["group_size"])


def mean_log(cells: list[Cell]) -> float:
    """Mean over cells and lengths of the logarithm of KL: a ratio counts the same anywhere."""
    return statistics.fmean(math.log(kl(c, "test", n)) for c in cells for n in LENGTHS)


def ratio(ours: dict[int, Cell], theirs: dict[int, Cell]) -> float | None:
    """KL of one by KL of another, the geometric mean over the seeds of both and over lengths."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    change = mean_log([ours[s] for s in seeds]) - mean_log([theirs[s] for s in seeds])
    return math.exp(change)


def minutes(cells: dict[str, dict[int, Cell]], name: str) -> float | None:
    """Of quantizing and tuning, the median over seeds; None where a part of it is not there."""
    if name in RIVALS:
        return statistics.median(cell["seconds"] / 60 for cell in cells[name].values())
    spent = []
    for seed in cells[name]:
        seconds, arm = 0.0, name
        while arm:
            if seed not in cells.get(arm, {}):
                return None
            seconds += sum(cells[arm][seed]["wall_seconds"].values())
            arm = tuning.ARMS[arm].start or ""
        spent.append(seconds / 60)
    return statistics.median(spent)


def table(cells: dict[str, dict[int, Cell]]) -> str:
    """One row a quantizer, best first."""
    heads = ["quantizer", "seeds", *(f"KL at {n}" for n in LENGTHS)]
    rows = [[*heads, *(f"perplexity at {n}" for n in LENGTHS), "min"]]
    for name in sorted(cells, key=lambda name: mean_log(list(cells[name].values()))):
        found = list(cells[name].values())
        spent = minutes(cells, name)
        rows.append(
            [
                RIVALS.get(name) or ROWS[name][0],
                str(len(found)),
                *(f"{statistics.fmean(kl(c, 'test', n) for c in found):.3f}" for n in LENGTHS),
                *(f"{_perplexity(found, n):.1f}" for n in LENGTHS),
                "" if spent is None else f"{spent:.1f}",
            ]
        )
    return markdown(rows)


def _perplexity(cells: list[Cell], length: int) -> float:
    return statistics.fmean(c["test"]["perplexity"][str(length)]["ppl"] for c in cells)


def verdict(cells: dict[str, dict[int, Cell]], where: str) -> str:
    """Our best against the best of the others, in a sentence."""
    ours = [name for name in cells if name in ROWS and ROWS[name][1]]
    theirs = [name for name in cells if name not in ours]
    if not ours or not theirs:
        return f"{where}: not both sides are measured."
    best, rival = (min(n, key=lambda x: mean_log(list(cells[x].values()))) for n in (ours, theirs))
    value = ratio(cells[best], cells[rival])
    label = RIVALS.get(rival) or ROWS[rival][0]
    if value is None:
        return f"{where}: our best and {label} share no seed."
    words = "behind" if value > 1 else "ahead"
    return f"{where}: our best is {words} of {label}, KL {value:.2f} of its (mean over lengths)."


def main() -> None:
    """Write the page."""
    groups: dict[tuple[str, str], dict[str, dict[int, Cell]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for cell in tuning.read_cells().values():
        if "test" in cell and cell["arm"] in ROWS:
            groups[cell["model"], cell["scheme"]][cell["arm"]][cell["seed"]] = cell
    for cell in board.read_cells():
        groups[cell["model"], cell["scheme"]][cell["quantizer"]][cell["seed"]] = cell
    titles = {
        key: f"{key[0]}, {key[1]} ({bits_a_weight(key[1]):.2f} bits a weight)" for key in groups
    }
    verdicts = [verdict(groups[key], titles[key]) for key in sorted(groups)]
    tables = [f"## {titles[key]}\n\n{table(groups[key])}\n" for key in sorted(groups)]
    cells = [cell for group in groups.values() for of in group.values() for cell in of.values()]
    machines = sorted({cell["machine"]["processor"] for cell in cells})
    PAGE.write_text(
        TEXT.read_text().format(
            verdicts="\n".join(f"- {line}" for line in verdicts),
            tables="\n".join(tables),
            machines="; ".join(machines),
        )
    )


if __name__ == "__main__":
    main()
