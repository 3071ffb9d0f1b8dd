"""What others' quantizers give at equal bits and equal text; judged as our own are.

    make peers                                                      # their environment, once
    .venv/bin/python benchmarks/board.py --quantizers autoround-light    # adds what is missing
    .venv/bin/python benchmarks/board_page.py                       # writes BOARD.md

Each cell is one line of ``benchmarks/results/board.jsonl``. Our own rows, rounding to nearest and
llm-compressor's GPTQ are cells of ``tuning.py --test``. Rivals get windows of the length that they
document, of the same articles and as many tokens; what they make is dequantized by themselves and
judged by our evaluation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import CALIBRATION, reference
from accuracy_arms import MAIN, SCHEMES, TOKENS
from safetensors.torch import save_file
from tqdm import tqdm
from tuning import judged, validation

from maca_llmc.common import record
from maca_llmc.data import build_calibration_set
from maca_llmc.model import loading

HERE = Path(__file__).parent
CELLS = HERE / "results" / "board.jsonl"
PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
KEY = ("model", "scheme", "quantizer", "seed")


@dataclass(frozen=True)
class Rival:
    """A quantizer of another package.

    :param script: beside this one, run by the rivals' Python
    :param length: tokens of a calibration window
    :param flags: for the script
    """

    script: str
    length: int
    flags: tuple[str, ...]


RIVALS = {
    "autoround-light": Rival("board_autoround.py", 512, ("--iters", "50")),
    "autoround": Rival("board_autoround.py", 512, ("--iters", "200")),
}


def scheme_of(name: str) -> dict[str, Any]:
    """A scheme of the grid in the words of AutoRound."""
    weights = SCHEMES[name]
    return {
        "bits": weights["num_bits"],
        "group_size": weights.get("group_size", -1),
        "sym": weights["symmetric"],
    }


def run_cell(cell: dict[str, Any], model: str) -> dict[str, Any]:
    """Quantize and judge one cell."""
    rival = RIVALS[cell["quantizer"]]
    source = loading.resolve_model(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = build_calibration_set(
            loading.load_tokenizer(source),
            source=CALIBRATION,
            scales=[rival.length],
            tokens=TOKENS,
            seed=cell["seed"],
        ).sequences
        save_file({"ids": torch.stack(list(windows))}, folder / "windows.safetensors")
        command = [PYTHON, HERE / rival.script, source, folder / "windows.safetensors"]
        command += [json.dumps(scheme_of(cell["scheme"])), folder / "made", *rival.flags]
        command += ["--seed", str(cell["seed"])]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{rival.script} ended with {done.returncode}: see what it printed")
        (made,) = {path.parent for path in (folder / "made").rglob("config.json")}
        return {
            **cell,
            "validation": judged(validation(model), made),
            "test": judged(reference(model, MAIN, 0), made),
            "tokens": sum(map(len, windows)),
            **json.loads(done.stdout.splitlines()[-1]),
            "versions": record.versions() | _version(rival.script),
            "machine": record.machine(torch.device("cpu")),
        }


def _version(script: str) -> dict[str, str]:
    package = script.removeprefix("board_").removesuffix(".py").replace("autoround", "auto-round")
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return {package: found.stdout.strip()}


def read_cells() -> list[dict[str, Any]]:
    """All cells so far."""
    return [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []


def main() -> None:
    """Parse the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"])
    parser.add_argument("--schemes", nargs="+", default=["w3-g32"], choices=SCHEMES)
    parser.add_argument("--quantizers", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    for needed, cure in ((CALIBRATION, "put the shared data there"), (PYTHON, "run: make peers")):
        if not needed.exists():
            sys.exit(f"{needed} is not there: {cure}")
    there = {tuple(cell[name] for name in KEY) for cell in read_cells()}
    wanted = [
        (dict(zip(KEY, key, strict=True)), model)
        for seed in arguments.seeds
        for scheme in arguments.schemes
        for quantizer in arguments.quantizers
        for model in arguments.models
        for key in [(Path(model).name, scheme, quantizer, seed)]
        if key not in there
    ]
    for cell, model in tqdm(wanted, desc="cells"):
        done = run_cell(cell, model)
        with CELLS.open("a") as file:
            file.write(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
