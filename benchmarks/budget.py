"""A budget of bits against one scheme for all, at the same size.

    .venv/bin/python benchmarks/budget.py --seeds 0     # adds what is missing

One line of ``benchmarks/results/budget.jsonl`` a cell: uniform ``W3A16`` in groups of 64, 3.25
bits, and the same spent on 2, 3 and 4 bits; so for ``W4A16``, 4.25 bits, and 3, 4 and 8.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy import CALIBRATION, reference
from accuracy_arms import HERE, MAIN, TOKENS
from tuning import judged, validation

import maca_llmc
from maca_llmc.common import record

CELLS = HERE / "results" / "budget.jsonl"
ARMS: dict[str, dict[str, Any]] = {
    "uniform 3.25": {"scheme": "W3A16"},
    "budget 3.25": {"bits": 3.25, "choose": "W2A16,W3A16,W4A16"},
    "uniform 4.25": {"scheme": "W4A16"},
    "budget 4.25": {"bits": 4.25, "choose": "W3A16,W4A16,W8A16"},
}
KEY = ("model", "arm", "seed")


def run_cell(cell: dict[str, Any], model: str) -> dict[str, Any]:
    """Quantize and judge one cell."""
    with tempfile.TemporaryDirectory() as name:
        folder = maca_llmc.quantize(
            Path(name) / "made",
            model=model,
            data=CALIBRATION,
            tokens=TOKENS,
            seed=cell["seed"],
            **ARMS[cell["arm"]],
        )
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        run = json.loads((folder / record.RECORD_FILE).read_text())
        return {
            **cell,
            "bytes": size,
            "scheme": run["scheme"],
            "validation": judged(validation(model), folder),
            "test": judged(reference(model, MAIN, 0), folder),
            "wall_seconds": run["wall_seconds"],
            "versions": record.versions(),
            "machine": record.machine(torch.device("cpu")),
        }


def main() -> None:
    """Parse the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    there = {tuple(json.loads(line)[name] for name in KEY) for line in lines}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            for model in arguments.models:
                key = (Path(model).name, arm, seed)
                if key not in there:
                    done = run_cell(dict(zip(KEY, key, strict=True)), model)
                    with CELLS.open("a") as file:
                        file.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
