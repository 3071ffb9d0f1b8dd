"""Which calibration keeps a model closest to its base: a grid over models, schemes and methods.

    python3 benchmarks/accuracy.py run --schemes w3-g32 --seeds 0 1    # adds what is missing
    python3 benchmarks/accuracy.py report                              # writes ACCURACY.md

Each cell is a run of the product (``maca_llmc.quantize``, then ``maca_llmc.evaluate``) and one line
of ``benchmarks/results/accuracy.jsonl``; cells that are there already are not run again. Every
method gets the same number of calibration tokens. Calibration text is whole Wikipedia articles and
evaluation text is WikiText-2's test split, both from ``../shared/data``; before anything is run, an
n-gram test makes sure that they do not overlap.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml
from tqdm import tqdm

import maca_llmc
from maca_llmc import record
from maca_llmc.data import read_documents
from maca_llmc.evaluation import Reference

HERE = Path(__file__).parent
CELLS = HERE / "results" / "accuracy.jsonl"
PAGE = HERE / "ACCURACY.md"
DATA = HERE.parents[1] / "shared" / "data"
CALIBRATION = DATA / "calibration" / "wiki_articles.jsonl"
EVALUATION = DATA / "wikitext2_test_raw.txt"

TOKENS = 16_384
LENGTHS = (128, 512, 2048)
WINDOWS = 12
TARGETS = 96
MIXED = (128, 256, 512, 1024, 2048)
SHORT = (32, 64, 128, 256, 512)
NGRAM = 13
BASELINES = ("gptq-512", "gptq-2048")

SCHEMES = {
    "w3-g32": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
    "w3-g64": {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": True},
    "w4-g64": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True},
}
OBSERVED = {"hessian_scales": False}
GPTQ = {"length_exponent": 0.0, **OBSERVED}
SEARCHED = {"hessian_scales": True}
SINK = "first_token_weight"
METHODS = {
    # name: the modifier's fields, and the calibration data
    **{f"gptq-{length}": (GPTQ, {"scales": (length,)}) for length in (128, 512, 2048)},
    **{
        f"mixed-p{exponent:g}": ({"length_exponent": exponent, **OBSERVED}, {"scales": MIXED})
        for exponent in (0.0, 0.5, 1.0)
    },
    "mixed-counts-p1": (OBSERVED, {"scales": MIXED, "balance": "counts"}),
    "documents-p1": (OBSERVED, {"scales": (2048,), "whole_documents": True}),
    "nested-p1": ({"nested_scales": [128, 256, 512, 1024], **OBSERVED}, {"scales": (2048,)}),
    **{
        f"gptq-2048-first{weight:g}": ({**GPTQ, SINK: weight}, {"scales": (2048,)})
        for weight in (4.0, 16.0, 64.0)
    },
    "gptq-128-first0.0625": ({**GPTQ, SINK: 1 / 16}, {"scales": (128,)}),
    "gptaq-2048": ({**GPTQ, "gptaq_alpha": 1.0}, {"scales": (2048,)}),
    "mse-gptq-2048": ({**GPTQ, "observer": "memoryless_mse"}, {"scales": (2048,)}),
    # with scales searched under the Hessian
    **{
        f"hs-gptq-{length}": ({**GPTQ, **SEARCHED}, {"scales": (length,)})
        for length in (128, 512, 2048)
    },
    "hs-mixed-p1": (SEARCHED, {"scales": MIXED}),
    "hs-mixed-p1-damp0.001": ({**SEARCHED, "dampening_frac": 0.001}, {"scales": MIXED}),
    "hs-mixed-p1-first4": ({**SEARCHED, SINK: 4.0}, {"scales": MIXED}),
    "hs-mixed-p1-first4-damp0.001": (
        {**SEARCHED, SINK: 4.0, "dampening_frac": 0.001},
        {"scales": MIXED},
    ),
    "hs-short-p1": (SEARCHED, {"scales": SHORT}),
    "hs-512-first16": ({**GPTQ, **SEARCHED, SINK: 16.0}, {"scales": (512,)}),
    "hs-2048-first64": ({**GPTQ, **SEARCHED, SINK: 64.0}, {"scales": (2048,)}),
    "hs-128-damp0.001": ({**GPTQ, **SEARCHED, "dampening_frac": 0.001}, {"scales": (128,)}),
    # and with GPTAQ
    **{
        f"hs-gptaq{prefix}-128-damp0.001": (
            {**GPTQ, **SEARCHED, "dampening_frac": 0.001, "gptaq_alpha": alpha},
            {"scales": (128,)},
        )
        for prefix, alpha in (("0.25", 0.25), ("", 1.0))
    },
    "hs-gptaq0.25-mixed-p1-first4": (
        {**SEARCHED, SINK: 4.0, "gptaq_alpha": 0.25},
        {"scales": MIXED},
    ),
}
KEY = ("model", "scheme", "method", "seed")


def read_cells() -> list[dict]:
    """All cells so far."""
    if not CELLS.exists():
        return []
    return [json.loads(line) for line in CELLS.read_text().splitlines()]


def missing_cells(arguments: argparse.Namespace) -> list[dict]:
    """What was asked for and is not there yet, seeds outermost: a broken-off run is balanced."""
    there = {tuple(cell[key] for key in KEY) for cell in read_cells()}
    wanted = [
        dict(zip(KEY, values, strict=True))
        for seed in arguments.seeds
        for scheme in arguments.schemes
        for method in arguments.methods
        for model in arguments.models
        for values in [(Path(model).name, scheme, method, seed)]
    ]
    return [cell for cell in wanted if tuple(cell[key] for key in KEY) not in there]


def overlap(one: Iterable[str], other: Iterable[str], size: int = NGRAM) -> set[str]:
    """Runs of ``size`` words that stand in both texts."""

    def ngrams(documents: Iterable[str]) -> set[str]:
        found = set()
        for document in documents:
            words = document.lower().split()
            found.update(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
        return found

    return ngrams(one) & ngrams(other)


def recipe_of(scheme: str, fields: dict) -> dict:
    """An llm-compressor recipe; ``observer`` is of the scheme, all other fields the modifier's."""
    fields = dict(fields)
    weights = SCHEMES[scheme] | {k: fields.pop(k) for k in ("observer",) if k in fields}
    modifier = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        **fields,
    }
    return {"quantize_stage": {"quantize_modifiers": {"MaCaModifier": modifier}}}


@cache
def reference(model: str) -> Reference:
    """What the unquantized model answers."""
    return Reference(model, text=EVALUATION, lengths=LENGTHS, windows=WINDOWS, targets=TARGETS)


def run_cell(cell: dict, model: str) -> dict:
    """Quantize and evaluate one cell."""
    fields, data = METHODS[cell["method"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(cell["scheme"], fields)))
        checkpoint = maca_llmc.quantize(
            folder / "checkpoint",
            model=model,
            recipe=recipe,
            data=CALIBRATION,
            tokens=TOKENS,
            seed=cell["seed"],
            **data,
        )
        run = json.loads((checkpoint / record.RECORD_FILE).read_text())
        results = reference(model).compare(checkpoint)
    return {
        **cell,
        "kl": results["kl"],
        "perplexity": results["perplexity"],
        "base_perplexity": reference(model).own["perplexity"],
        "settings": {
            k: v for k, v in reference(model).settings.items() if k not in ("base", "text")
        },
        "tokens": run["calibration"]["tokens"],
        "wall_seconds": run["wall_seconds"],
        "raised_dampening": len(run["raised_dampening"]),
        "versions": record.versions(),
        "machine": record.machine(),
    }


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing, each cell written as soon as it is done."""
    for path in (CALIBRATION, EVALUATION):
        if not path.exists():
            sys.exit(f"{path} is not there: put the shared data beside the checkout")
    shared = overlap(*(map(str, read_documents(path)) for path in (CALIBRATION, EVALUATION)))
    if shared:
        sys.exit(f"calibration and evaluation text share {len(shared)} runs of {NGRAM} words")
    CELLS.parent.mkdir(exist_ok=True)
    folders = {Path(model).name: model for model in arguments.models}
    for cell in tqdm(missing_cells(arguments), desc="cells"):
        done = run_cell(cell, folders[cell["model"]])
        with CELLS.open("a") as file:
            file.write(json.dumps(done) + "\n")


def mean_kl(cell: dict, length: int) -> float:
    """KL divergence to the base, nats per token."""
    return cell["kl"][str(length)]["mean"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def paired_p(one: list[dict], other: list[dict], length: int) -> float | None:
    """p of a paired t test over seeds that two methods share; None with fewer than two."""
    from scipy import stats

    by_seed = {cell["seed"]: mean_kl(cell, length) for cell in other}
    pairs = [(mean_kl(c, length), by_seed[c["seed"]]) for c in one if c["seed"] in by_seed]
    if len(pairs) < 2:
        return None
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)


def holm(values: list[float | None]) -> list[float | None]:
    """p values corrected for how many were looked at (Holm, 1979)."""
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i])
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def table(cells: list[dict], model: str, scheme: str) -> str:
    """KL by method and length, with tests against each baseline."""
    groups: dict[str, list[dict]] = {}
    for cell in cells:
        if (cell["model"], cell["scheme"]) == (model, scheme):
            groups.setdefault(cell["method"], []).append(cell)
    heads = ["method", "seeds", *(f"KL at {length}" for length in LENGTHS)]
    heads += [f"p against {name}, at {'/'.join(map(str, LENGTHS))}" for name in BASELINES]
    order = sorted(
        groups,
        key=lambda m: sum(statistics.fmean(mean_kl(c, n) for c in groups[m]) for n in LENGTHS),
    )
    tests = {
        baseline: holm(
            [
                None
                if method == baseline or baseline not in groups
                else paired_p(groups[method], groups[baseline], length)
                for method in order
                for length in LENGTHS
            ]
        )
        for baseline in BASELINES
    }
    rows = [heads, ["---"] * len(heads)]
    for number, method in enumerate(order):
        found = groups[method]
        row = [method, str(len(found))]
        row += [spread([mean_kl(cell, length) for cell in found]) for length in LENGTHS]
        for baseline in BASELINES:
            start = number * len(LENGTHS)
            values = tests[baseline][start : start + len(LENGTHS)]
            row.append(" / ".join("—" if p is None else f"{p:.2g}" for p in values))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report(_: argparse.Namespace) -> None:
    """Write the page from the cells."""
    cells = read_cells()
    if not cells:
        sys.exit(f"{CELLS} has no cells: run `accuracy.py run` first")
    parts = [
        "# Accuracy by calibration method",
        "Written by `benchmarks/accuracy.py report` from `benchmarks/results/accuracy.jsonl`. "
        f"KL divergence to the BF16 model in nats per token, on {WINDOWS} windows of WikiText-2's "
        f"test split; {TOKENS} calibration tokens of Wikipedia articles for every method; mean ± "
        "standard deviation over seeds (order and choice of the data); p of a paired t test over "
        "seeds, corrected by Holm within a table. Best method first.",
    ]
    for model, scheme in dict.fromkeys((cell["model"], cell["scheme"]) for cell in cells):
        parts += [f"## {model}, {scheme}", table(cells, model, scheme)]
    seeds = {cell["seed"] for cell in cells}
    parts.append(
        f"Seeds: {len(seeds)}. Machine: {cells[-1]['machine']['processor']}, "
        f"{cells[-1]['machine']['cores']} cores."
    )
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(PAGE.read_text())


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="run what is missing of a grid")
    runner.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"])
    runner.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    runner.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    runner.set_defaults(function=run)
    commands.add_parser("report", help="write ACCURACY.md").set_defaults(function=report)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
