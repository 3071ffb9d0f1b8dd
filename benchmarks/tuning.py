"""What tuning after rounding is worth: arms over models, schemes and seeds, as many tokens each.

    .venv/bin/python benchmarks/tuning.py --arms ours light both   # adds what is missing
    .venv/bin/python benchmarks/tuning.py --arms light --test       # and judges by the test text
    .venv/bin/python benchmarks/tuning_page.py                      # writes TUNING.md

Each cell is a run of the product (``maca_llmc.quantize`` for the start, then ``maca_llmc.tune``)
and one line of ``benchmarks/results/tuning.jsonl``. Choices are made by ``validation``, windows of
the sample text inside the package; ``--test`` adds the grid's test text, which only reports.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from accuracy import CALIBRATION, recipe_of, reference
from accuracy_arms import DEFAULT, MAIN, METHODS, MIXED, SCHEMES, TOKENS
from tqdm import tqdm

import maca_llmc
from maca_llmc.common import record
from maca_llmc.evaluation.divergence import Reference
from maca_llmc.tuning.options import BlockOptions, EndToEndOptions

CELLS = Path(__file__).parent / "results" / "tuning.jsonl"
CHECKPOINTS = Path(__file__).parents[1] / "runs" / "tuning"
VALIDATION = {"text": None, "lengths": MAIN.lengths, "windows": 12, "targets": 64}
NEAREST, NEAREST_MSE, AWQ = "nearest", "nearest by squared error", "awq"
KEY = ("model", "scheme", "arm", "seed")
Cell = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A way to a checkpoint: quantize by a method, or tune what another arm made.

    :param method: of the grid, or to the nearest code
    :param start: the arm that made what is tuned
    :param blocks: options of the stage that differ from the defaults, None to leave it out; so
        ``end_to_end``
    :param tokens: of the stage
    """

    method: str | None = None
    start: str | None = None
    blocks: dict[str, Any] | None = None
    end_to_end: dict[str, Any] | None = None
    lengths: tuple[int, ...] = MIXED
    tokens: int = TOKENS


QUANTIZED = {
    "nearest": Arm(method=NEAREST),
    "nearest-mse": Arm(method=NEAREST_MSE),
    "awq": Arm(method=AWQ, lengths=(512,)),
    "stock": Arm(method="gptq-2048"),
    "stock-512": Arm(method="gptq-512"),
    "paper": Arm(method="mixed-p1"),
    "ours": Arm(method=DEFAULT),
}


def _ablation() -> dict[str, Arm]:
    """{start} x {one length, several} x {tokens alike, each sequence one sample} x {stages}."""
    alike = {"length_exponent": 0.0}
    data: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        "one": (alike, (2048,)),
        "several": (alike, MIXED),
        "maca": ({}, MIXED),
    }
    arms = {}
    for start in ("nearest", "stock", "ours"):
        for name, (fields, lengths) in data.items():
            blocks, scales = f"{start}-{name}-blocks", {"end_to_end": fields, "lengths": lengths}
            arms[blocks] = Arm(start=start, blocks=fields, lengths=lengths)
            arms[f"{start}-{name}-scales"] = Arm(start=start, **scales)
            arms[f"{start}-{name}-both"] = Arm(start=blocks, **scales)
    return arms


ARMS = {
    **QUANTIZED,
    "light": Arm(start="ours", blocks={}),
    "scales": Arm(start="ours", end_to_end={}),
    "both": Arm(start="light", end_to_end={}),
    **{f"light-{n}k": Arm(start="ours", blocks={}, tokens=n * 1024) for n in (32, 64)},
    **{f"scales-{n}k": Arm(start="ours", end_to_end={}, tokens=n * 1024) for n in (32, 64)},
    **{f"both-{n}k": Arm(start=f"light-{n}k", end_to_end={}, tokens=n * 1024) for n in (32, 64)},
    # what blocks are made of, one thing changed at a time
    "blocks-squared-error": Arm(start="ours", blocks={"sensitivity_tokens": 0}),
    **{
        f"blocks-rate{rate:g}": Arm(start="ours", blocks={"rate": rate})
        for rate in (0.0025, 0.005, 0.01, 0.02)
    },
    **{f"blocks-{n}-steps": Arm(start="ours", blocks={"steps": n}) for n in (25, 100)},
    **_ablation(),
}


def checkpoint(cell: Cell, model: str) -> Path:
    """A cell's checkpoint; made once and kept, for arms that begin with it."""
    arm = ARMS[cell["arm"]]
    folder = CHECKPOINTS / "-".join(str(cell[name]) for name in KEY)
    if folder.exists():
        return folder
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    if arm.method:
        return quantized(arm.method, cell, model, folder)
    return maca_llmc.tune(
        checkpoint({**cell, "arm": arm.start}, model),
        folder,
        base=model,
        blocks=arm.blocks is not None and BlockOptions(**arm.blocks),
        end_to_end=arm.end_to_end is not None and EndToEndOptions(**arm.end_to_end),
        data=CALIBRATION,
        lengths=arm.lengths,
        tokens=arm.tokens,
        seed=cell["seed"],
    )


def quantized(method: str, cell: Cell, model: str, folder: Path) -> Path:
    """Quantize as the grid does, or to nearest."""
    nearest = method in (NEAREST, NEAREST_MSE, AWQ)
    fields, data = METHODS[DEFAULT if nearest else method]
    data = {"scales": (512,)} if method == AWQ else data
    observed = {"observer": "memoryless_mse"} if method == NEAREST_MSE else {}
    recipe = recipe_of(cell["scheme"], fields | observed)
    if nearest:
        (modifiers,) = (stage["quantize_modifiers"] for stage in recipe.values())
        kept = {name: modifiers["MaCaModifier"][name] for name in ("config_groups", "ignore")}
        before = {"AWQModifier": {}} if method == AWQ else {}
        made = {**before, "QuantizationModifier": kept}
        recipe = {"quantize_stage": {"quantize_modifiers": made}}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return maca_llmc.quantize(
            folder,
            model=model,
            recipe=path,
            data=CALIBRATION,
            tokens=TOKENS,
            seed=cell["seed"],
            **data,
        )


@cache
def validation(model: str) -> Reference:
    """What the unquantized model answers on validation text."""
    return Reference(model, **VALIDATION)


def run_cell(cell: Cell, model: str, test: bool, questions: int) -> Cell:
    """Tune and judge one cell."""
    folder = checkpoint(cell, model)
    run = json.loads((folder / record.RECORD_FILE).read_text())
    found = {"validation": judged(validation(model), folder)}
    if test:
        found["test"] = judged(reference(model, MAIN, questions), folder)
    stage = run.get("tuning", run) if ARMS[cell["arm"]].start else run
    return {
        **cell,
        "options": asdict(ARMS[cell["arm"]]),
        **found,
        "tokens": stage["calibration"]["tokens"],
        "wall_seconds": stage["wall_seconds"],
        "versions": record.versions(),
        "machine": stage["machine"],
    }


def judged(judge: Reference, folder: Path) -> dict[str, Any]:
    """How far a checkpoint is from its base, by length, and its answers to tasks."""
    results = judge.compare(folder)
    return {name: results[name] for name in ("kl", "perplexity", "tasks") if results.get(name)}


def read_cells() -> dict[tuple[Any, ...], Cell]:
    """All cells so far; of one that was run twice the last, with what either was judged by."""
    cells: dict[tuple[Any, ...], Cell] = {}
    if CELLS.exists():
        for line in CELLS.read_text().splitlines():
            cell = json.loads(line)
            key = tuple(cell[name] for name in KEY)
            cells[key] = cells.get(key, {}) | cell
    return cells


def main() -> None:
    """Parse the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"])
    parser.add_argument("--schemes", nargs="+", default=["w3-g32"], choices=SCHEMES)
    parser.add_argument("--arms", nargs="+", default=["ours", "light", "both"], choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test", action="store_true", help="report the grid's test text too")
    parser.add_argument("--questions", type=int, default=0, help="of each task, with --test")
    arguments = parser.parse_args()
    if not CALIBRATION.exists():
        sys.exit(f"{CALIBRATION} is not there: put the shared data beside the checkout")
    there = read_cells()
    wanted = [
        (dict(zip(KEY, key, strict=True)), model)
        for seed in arguments.seeds
        for scheme in arguments.schemes
        for arm in arguments.arms
        for model in arguments.models
        for key in [(Path(model).name, scheme, arm, seed)]
        if "validation" not in there.get(key, {}) or (arguments.test and "test" not in there[key])
    ]
    for cell, model in tqdm(wanted, desc="cells"):
        done = run_cell(cell, model, arguments.test, arguments.questions)
        with CELLS.open("a") as file:
            file.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
