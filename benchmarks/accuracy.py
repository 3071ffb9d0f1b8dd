"""Which calibration keeps a model closest to its base: a grid over models, schemes and methods.

    .venv/bin/python benchmarks/accuracy.py --schemes w3-g32 --seeds 0 1   # adds what is missing
    .venv-serve/bin/python benchmarks/accuracy_page.py                     # writes ACCURACY.md

Each cell is a run of the product (``maca_llmc.quantize``, then ``maca_llmc.evaluation``) and one
line of ``benchmarks/results/accuracy.jsonl`` (with ``--contexts``, for shorter and longer inputs,
of ``accuracy_contexts.jsonl``). Cells that are there already are not run again, so several of these
may run side by side. Methods are in ``accuracy_arms.py``. Every one gets the same budget of
calibration tokens, to the nearest whole window. Calibration text is whole Wikipedia articles and
evaluation text is WikiText-2's test split, both from ``../shared/data``; before anything is run, an
n-gram test makes sure that they do not overlap.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml
from accuracy_arms import (
    CONTEXTS,
    KEY,
    MAIN,
    METHODS,
    SCHEMES,
    TOKENS,
    WINDOWS,
    Judging,
    identity,
    read_cells,
)
from tqdm import tqdm

import maca_llmc
from maca_llmc.common import record
from maca_llmc.data import read_documents
from maca_llmc.evaluation.divergence import Reference

DATA = Path(__file__).parents[2] / "shared" / "data"
CALIBRATION = DATA / "calibration" / "wiki_articles.jsonl"
EVALUATION = DATA / "wikitext2_test_raw.txt"
TASKS = tuple(
    DATA / "zeroshot" / f"{name}.jsonl" for name in ("arc_easy", "boolq", "openbookqa", "piqa")
)
NGRAM = 13


def missing_cells(arguments: argparse.Namespace) -> list[dict]:
    """What was asked for and is not there yet, seeds outermost: a broken-off run is balanced.

    With questions, cells that were asked none are not there.
    """
    there = {
        identity(cell)
        for cell in read_cells(arguments.judging)
        if cell.get("tasks") or not arguments.questions
    }
    wanted = [
        dict(zip(KEY, values, strict=True))
        for seed in arguments.seeds
        for scheme in arguments.schemes
        for method in arguments.methods
        for model in arguments.models
        for values in [(Path(model).name, scheme, method, seed)]
    ]
    return [cell for cell in wanted if identity(cell) not in there]


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
    """An llm-compressor recipe.

    ``observer`` is of the scheme, ``rotations`` of a SpinQuantModifier before the modifier, whose
    are all other fields.
    """
    fields = dict(fields)
    rotations = fields.pop("rotations", None)
    spin = {"rotations": rotations, "transform_type": "random-hadamard"}
    weights = SCHEMES[scheme] | {k: fields.pop(k) for k in ("observer",) if k in fields}
    modifier = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        **fields,
    }
    before = {"SpinQuantModifier": spin} if rotations else {}
    return {"quantize_stage": {"quantize_modifiers": {**before, "MaCaModifier": modifier}}}


@cache
def reference(model: str, judging: Judging, questions: int) -> Reference:
    """What the unquantized model answers; with that many questions of each task."""
    return Reference(
        model,
        text=EVALUATION,
        lengths=judging.lengths,
        windows=WINDOWS,
        targets=judging.targets,
        tasks=TASKS if questions else (),
        limit=questions or 1,
    )


def quantize(cell: dict, model: str, folder: Path) -> Path:
    """Make a cell's checkpoint in a folder that exists."""
    fields, data = METHODS[cell["method"]]
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(cell["scheme"], fields)))
    return maca_llmc.quantize(
        folder / "checkpoint",
        model=model,
        recipe=recipe,
        data=CALIBRATION,
        tokens=TOKENS,
        seed=cell["seed"],
        **data,
    )


def run_cell(cell: dict, model: str, judging: Judging, questions: int) -> dict:
    """Quantize and evaluate one cell."""
    base = reference(model, judging, questions)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = quantize(cell, model, Path(folder))
        run = json.loads((checkpoint / record.RECORD_FILE).read_text())
        results = base.compare(checkpoint)
    return {
        **cell,
        "kl": results["kl"],
        "perplexity": results["perplexity"],
        "base_perplexity": base.own["perplexity"],
        "tasks": results["tasks"],
        "base_tasks": base.own["tasks"],
        "settings": {k: v for k, v in base.settings.items() if k not in ("base", "text")},
        "tokens": run["calibration"]["tokens"],
        "wall_seconds": run["wall_seconds"],
        "raised_dampening": len(run["raised_dampening"]),
        "versions": record.versions(),
        "machine": record.machine(base.device),
    }


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing, each cell written as soon as it is done."""
    for path in (CALIBRATION, EVALUATION, *TASKS):
        if not path.exists():
            sys.exit(f"{path} is not there: put the shared data beside the checkout")
    shared = overlap(*(map(str, read_documents(path)) for path in (CALIBRATION, EVALUATION)))
    if shared:
        sys.exit(f"calibration and evaluation text share {len(shared)} runs of {NGRAM} words")
    folders = {Path(model).name: model for model in arguments.models}
    for cell in tqdm(missing_cells(arguments), desc="cells"):
        done = run_cell(cell, folders[cell["model"]], arguments.judging, arguments.questions)
        with arguments.judging.cells.open("a") as file:
            file.write(json.dumps(done) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--questions", type=int, default=0, help="of each zero-shot task")
    parser.add_argument(
        "--contexts",
        dest="judging",
        action="store_const",
        default=MAIN,
        const=CONTEXTS,
        help=f"judge at {', '.join(map(str, CONTEXTS.lengths))} tokens, into {CONTEXTS.cells.name}",
    )
    run(parser.parse_args())


if __name__ == "__main__":
    main()
