"""What tuning after rounding is worth: arms over models, schemes and seeds, as many tokens each.

    .venv/bin/python benchmarks/tuning.py --arms start light both   # adds what is missing
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
STARTS = Path(__file__).parents[1] / "runs" / "tuning-starts"
VALIDATION = {"text": None, "lengths": MAIN.lengths, "windows": 12, "targets": 64}
NEAREST = "nearest"
KEY = ("model", "scheme", "arm", "seed")


@dataclass(frozen=True)
class Arm:
    """A way of tuning.

    :param start: a method of the grid, or ``NEAREST``
    :param blocks: options of the stage that differ from the defaults, None to leave it out; so
        ``end_to_end``
    :param tokens: of each stage
    """

    start: str = DEFAULT
    blocks: dict[str, Any] | None = None
    end_to_end: dict[str, Any] | None = None
    lengths: tuple[int, ...] = MIXED
    tokens: int = TOKENS


ALIKE = {"length_exponent": 0.0}
ONE = {"lengths": (2048,)}
PAPER = "mixed-p1"
STOCK = "gptq-2048"


def _ablation() -> dict[str, Arm]:
    """{start} x {one length, several} x {tokens alike, each sequence one sample} x {stages}."""
    starts = {"nearest": NEAREST, "stock": STOCK, "ours": DEFAULT}
    data = {
        "one": (ALIKE, ONE),
        "several": (ALIKE, {}),
        "maca": ({}, {}),
    }
    stages = {
        "blocks": lambda fields: {"blocks": fields},
        "e2e": lambda fields: {"end_to_end": fields},
        "both": lambda fields: {"blocks": fields, "end_to_end": fields},
    }
    return {
        f"{start}-{text}-{stage}": Arm(start=method, **settings, **of_stages(fields))
        for start, method in starts.items()
        for text, (fields, settings) in data.items()
        for stage, of_stages in stages.items()
    }


ARMS = {
    "nearest": Arm(start=NEAREST),
    "stock": Arm(start=STOCK),
    "start": Arm(),
    "light": Arm(blocks={}),
    "scales": Arm(end_to_end={}),
    "both": Arm(blocks={}, end_to_end={}),
    **{f"light-{n}k": Arm(blocks={}, tokens=n * 1024) for n in (32, 64)},
    **{f"scales-{n}k": Arm(end_to_end={}, tokens=n * 1024) for n in (32, 64)},
    **{f"full-{n}k": Arm(blocks={}, end_to_end={}, tokens=n * 1024) for n in (32, 64, 256)},
    # what blocks are made of, one thing changed at a time
    "blocks-squared-error": Arm(blocks={"sensitivity_tokens": 0}),
    "blocks-first0.1": Arm(blocks={"sensitivity_tokens": 0, "first_token_weight": 0.1}),
    **{f"blocks-rate{rate:g}": Arm(blocks={"rate": rate}) for rate in (0.0025, 0.01, 0.02)},
    "blocks-25-steps": Arm(blocks={"steps": 25}),
    "blocks-100-steps": Arm(blocks={"steps": 100}),
    **_ablation(),
}


def start_of(cell: dict[str, Any], model: str) -> Path:
    """The quantized checkpoint that an arm begins with; made once and kept."""
    method = ARMS[cell["arm"]].start
    folder = STARTS / f"{cell['model']}-{cell['scheme']}-{method}-{cell['seed']}"
    if folder.exists():
        return folder
    fields, data = METHODS[DEFAULT] if method == NEAREST else METHODS[method]
    content = recipe_of(cell["scheme"], fields)
    if method == NEAREST:
        groups = {
            "config_groups": content["quantize_stage"]["quantize_modifiers"]["MaCaModifier"][
                "config_groups"
            ]
        }
        content = {
            "quantize_stage": {
                "quantize_modifiers": {"QuantizationModifier": {**groups, "ignore": ["lm_head"]}}
            }
        }
    STARTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(content))
        return maca_llmc.quantize(
            folder,
            model=model,
            recipe=recipe,
            data=CALIBRATION,
            tokens=TOKENS,
            seed=cell["seed"],
            **data,
        )


@cache
def validation(model: str) -> Reference:
    """What the unquantized model answers on validation text."""
    return Reference(model, **VALIDATION)


def tuned(cell: dict[str, Any], model: str, folder: Path) -> Path:
    """An arm's checkpoint."""
    arm, start = ARMS[cell["arm"]], start_of(cell, model)
    if arm.blocks is None and arm.end_to_end is None:
        return start
    return maca_llmc.tune(
        start,
        folder / "tuned",
        base=model,
        blocks=arm.blocks is not None and BlockOptions(**arm.blocks),
        end_to_end=arm.end_to_end is not None and EndToEndOptions(**arm.end_to_end),
        data=CALIBRATION,
        lengths=arm.lengths,
        tokens=arm.tokens,
        seed=cell["seed"],
    )


def run_cell(cell: dict[str, Any], model: str, test: bool, questions: int) -> dict[str, Any]:
    """Tune and judge one cell."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tuned(cell, model, Path(folder))
        run = json.loads((checkpoint / record.RECORD_FILE).read_text())
        found = {"validation": _judged(validation(model), checkpoint)}
        if test:
            found["test"] = _judged(reference(model, MAIN, questions), checkpoint)
    tuning = run.get("tuning", {})
    return {
        **cell,
        "options": asdict(ARMS[cell["arm"]]),
        **found,
        "tokens": tuning.get("calibration", run["calibration"])["tokens"],
        "start_seconds": run["wall_seconds"],
        "tune_seconds": tuning.get("wall_seconds", {}),
        "peak_rss_mb": tuning.get("peak_rss_mb"),
        "versions": record.versions(),
        "machine": record.machine(validation(model).device),
    }


def _judged(judge: Reference, checkpoint: Path) -> dict[str, Any]:
    results = judge.compare(checkpoint)
    return {name: results[name] for name in ("kl", "perplexity", "tasks") if results.get(name)}


def read_cells() -> dict[tuple[Any, ...], dict[str, Any]]:
    """All cells so far; of one that was run twice the last, with what either was judged by."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
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
    parser.add_argument("--arms", nargs="+", default=["start", "light", "both"], choices=ARMS)
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
