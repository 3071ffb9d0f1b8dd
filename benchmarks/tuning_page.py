"""Write TUNING.md from the cells of ``tuning.py``.

.venv/bin/python benchmarks/tuning_page.py
"""

import json
import math
import statistics
from collections import defaultdict
from typing import Any

from accuracy_arms import HERE, LENGTHS
from tables import markdown
from tuning import ARMS, read_cells

PAGE = HERE / "TUNING.md"
Cell = dict[str, Any]
Group = dict[str, dict[int, Cell]]
"""By arm and seed, of one model and scheme."""

TRIALS = HERE / "results" / "tuning_trials.json"

HEAD = """# What tuning after rounding is worth

Written by `benchmarks/tuning_page.py` from `benchmarks/results/tuning.jsonl`, whose cells
`benchmarks/tuning.py` makes. KL divergence to the unquantized model in nats a token at input
lengths {lengths}. "After / before" is the mean over lengths and seeds of KL after tuning by KL of
the checkpoint that it began with, seed by seed; below 1 is better. Choices were made by validation
text (the sample inside the package); test text (WikiText-2's) only reports. Minutes are of tuning
alone, on machines shared with other work: {machines}.
"""


def kl(cell: Cell, text: str, length: int) -> float:
    """KL divergence to the base, nats a token."""
    return float(cell[text]["kl"][str(length)]["mean"])


def start_of(arm: str) -> str:
    """The arm whose checkpoint had not been tuned, with which this one's way began."""
    start = ARMS[arm].start
    return arm if start is None else start_of(start)


def minutes(group: Group, arm: str, seed: int) -> float:
    """Of tuning, with all that was done before it but the first quantization; NaN if not known."""
    start = ARMS[arm].start
    if start is None:
        return 0.0
    if seed not in group.get(arm, {}):
        return math.nan
    own = sum(group[arm][seed]["wall_seconds"].values()) / 60
    return own + minutes(group, start, seed)


def ratio(group: Group, arm: str, text: str) -> float | None:
    """KL after by KL before, the mean over lengths of each seed's ratio."""
    if start_of(arm) == arm:
        return None
    start = group.get(start_of(arm), {})
    found = [
        kl(cell, text, length) / kl(start[seed], text, length)
        for seed, cell in group[arm].items()
        if text in cell and text in start.get(seed, {})
        for length in LENGTHS
    ]
    return statistics.fmean(found) if found else None


def table(group: Group, text: str) -> str:
    """Arms that were judged by a text, best first; "" where none was."""
    judged = {
        arm: [cell for cell in seeds.values() if text in cell] for arm, seeds in group.items()
    }
    judged = {arm: cells for arm, cells in judged.items() if cells}
    if not judged:
        return ""
    rows = [["arm", "seeds", *(f"KL at {n}" for n in LENGTHS), "after / before", "tokens", "min"]]
    for arm, cells in sorted(judged.items(), key=lambda item: _mean_kl(item[1], text)):
        of_lengths = [statistics.fmean(kl(cell, text, n) for cell in cells) for n in LENGTHS]
        value = ratio(group, arm, text)
        spent = statistics.median(minutes(group, arm, cell["seed"]) for cell in cells)
        rows.append(
            [
                arm,
                str(len(cells)),
                *(f"{value:.4f}" for value in of_lengths),
                "" if value is None else f"{value:.3f}",
                f"{cells[0]['tokens']:,}",
                f"{spent:.1f}" if spent > 0 else "",
            ]
        )
    return markdown(rows)


def _mean_kl(cells: list[Cell], text: str) -> float:
    return statistics.fmean(kl(cell, text, n) for cell in cells for n in LENGTHS)


def trials() -> str:
    """Variants that were tried on the way, and what came of each."""
    found = json.loads(TRIALS.read_text())
    rows = [["variant", *(f"KL at {n}" for n in LENGTHS), "in the product"]]
    for trial in found["trials"]:
        values = [f"{value:.4f}" for value in trial["kl"]]
        rows.append([trial["variant"], *values, trial["outcome"]])
    return f"## Tried on the way\n\n{found['about']}\n\n{markdown(rows)}\n"


def arms_described(groups: dict[tuple[str, str], Group]) -> str:
    """What the arms of the page are, from their definitions."""
    rows = [["arm", "start", "blocks", "end to end", "lengths"]]
    for arm in sorted({arm for group in groups.values() for arm in group}):
        options = ARMS[arm]
        stages = [
            "" if stage is None else _fields(stage)
            for stage in (options.blocks, options.end_to_end)
        ]
        rows.append(
            [
                arm,
                options.start or options.method or "",
                *stages,
                ", ".join(map(str, options.lengths)),
            ]
        )
    return markdown(rows)


def _fields(stage: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in stage.items()) or "by default"


def main() -> None:
    """Write the page."""
    groups: dict[tuple[str, str], Group] = defaultdict(lambda: defaultdict(dict))
    for cell in read_cells().values():
        groups[cell["model"], cell["scheme"]][cell["arm"]][cell["seed"]] = cell
    machines = sorted({_machine(cell) for cell in read_cells().values()})
    parts = [HEAD.format(lengths=", ".join(map(str, LENGTHS)), machines="; ".join(machines))]
    for text, title in (("test", "Test text"), ("validation", "Validation text")):
        for (model, scheme), group in sorted(groups.items()):
            if found := table(group, text):
                parts.append(f"## {title}: {model}, {scheme}\n\n{found}\n")
    parts.append(trials())
    parts.append(f"## The arms\n\n{arms_described(groups)}\n")
    PAGE.write_text("\n".join(parts))


def _machine(cell: Cell) -> str:
    machine = cell["machine"]
    return f"{machine['processor']}, {machine['threads']} threads"


if __name__ == "__main__":
    main()
