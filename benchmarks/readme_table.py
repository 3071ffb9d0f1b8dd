"""Write the README's table from the grid's cells: the default against the best stock window.

.venv/bin/python benchmarks/readme_table.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from accuracy_arms import LENGTHS, read_cells
from tables import markdown

README = Path(__file__).parents[1] / "README.md"
PLACE = re.compile(r"(<!-- by benchmarks/readme_table.py -->\n).*?(<!-- end -->)", re.DOTALL)

OURS = "hs2-mixed-p1-first4"
WINDOWS = (128, 512, 2048)
ASKED = "gptq-2048"
"""The stock window whose checkpoints were asked the zero-shot questions."""

MODELS = {
    "smollm2-135m-instruct": "SmolLM2 135M",
    "gemma-3-270m": "Gemma 3 270M",
    "qwen2.5-coder-0.5b-instruct": "Qwen2.5 Coder 0.5B",
}
SCHEMES = {
    "w3-g32": "3 bits, groups of 32",
    "w3-g64": "3 bits, groups of 64",
    "w4-g64": "4 bits, groups of 64",
}
BY_BYTE = {"arc_easy", "openbookqa", "piqa"}
HEAD = [
    "model, scheme",
    "stock, its best window",
    "ours",
    "ours / stock",
    "tasks: stock, ours, base",
]

BySeed = dict[int, dict]


def kl(cells: BySeed, seeds: list[int]) -> list[float]:
    """Mean KL over seeds by input length, nats per token."""
    return [fmean(cells[seed]["kl"][str(n)]["mean"] for seed in seeds) for n in LENGTHS]


def best_stock(grid: dict[str, BySeed]) -> tuple[int, list[int]]:
    """The window at which stock GPTQ is best against ours, and the seeds both have there."""
    ratios = {}
    for window in WINDOWS:
        stock = grid.get(f"gptq-{window}", {})
        if seeds := sorted(stock.keys() & grid[OURS].keys()):
            ours, theirs = kl(grid[OURS], seeds), kl(stock, seeds)
            ratios[window] = sum(ours) / sum(theirs), seeds
    window = max(ratios, key=lambda n: ratios[n][0])
    return window, ratios[window][1]


def percent(cells: list[dict], key: str) -> float:
    """Mean over tasks and cells of questions answered right."""
    accuracies = [
        cell[key][task]["acc_norm" if task in BY_BYTE else "acc"]
        for cell in cells
        for task in cell[key]
    ]
    return 100 * fmean(accuracies)


def tasks(grid: dict[str, BySeed]) -> str:
    """Percent right, where five seeds of both were asked."""
    stock, ours = (
        [cell for cell in grid.get(method, {}).values() if cell["tasks"]]
        for method in (ASKED, OURS)
    )
    if min(len(stock), len(ours)) < 5:
        return "—"
    found = percent(stock, "tasks"), percent(ours, "tasks"), percent(ours, "base_tasks")
    return ", ".join(f"{value:.1f}" for value in found)


def rows() -> Iterator[list[str]]:
    """One row per model and scheme."""
    grids: dict[tuple[str, str], dict[str, BySeed]] = {}
    for cell in read_cells():
        grid = grids.setdefault((cell["model"], cell["scheme"]), {})
        grid.setdefault(cell["method"], {})[cell["seed"]] = cell
    yield HEAD
    for model, model_words in MODELS.items():
        for scheme, scheme_words in SCHEMES.items():
            grid = grids[model, scheme]
            window, seeds = best_stock(grid)
            stock, ours = kl(grid[f"gptq-{window}"], seeds), kl(grid[OURS], seeds)
            few = "" if len(seeds) >= 5 else " ¹"
            yield [
                f"{model_words}, {scheme_words}{few}",
                f"{_slashed(stock)} at {window}",
                _slashed(ours),
                _slashed([o / s for o, s in zip(ours, stock, strict=True)]),
                tasks(grid),
            ]


def _slashed(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def main() -> None:
    """Put the table between its marks."""
    text = README.read_text(encoding="utf-8")
    README.write_text(
        PLACE.sub(lambda found: f"{found[1]}{markdown(list(rows()))}\n{found[2]}", text),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
