"""How much KL divergence is lost when only the base's k likeliest answers are kept.

    .venv/bin/python benchmarks/kept_answers.py BASE CHECKPOINT [CHECKPOINT ...]

Against the whole vocabulary, on the sample text inside the package; ``results/kept_answers.json``.
"""

import argparse
import json
from pathlib import Path

import torch
from accuracy_arms import HERE
from transformers import PreTrainedModel

from maca_llmc.common import record
from maca_llmc.data import build_calibration_set
from maca_llmc.evaluation.divergence import load_dequantized
from maca_llmc.model import loading
from maca_llmc.tuning.divergence import divergence, top_answers

RESULTS = HERE / "results" / "kept_answers.json"
KEPT = (16, 64, 256, 1024, 4096, 16384)
LENGTHS, TOKENS = (128, 512, 2048), 8192
CPU = torch.device("cpu")


def full_divergence(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL(base || model) of logits ``[T, vocabulary]``, nats at each token."""
    p, q = base.double().log_softmax(-1), model.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def measure(
    base: PreTrainedModel, model: PreTrainedModel, windows: list[torch.Tensor]
) -> dict[str, float]:
    """Mean KL over tokens: of the whole vocabulary, and by how many answers are kept."""
    sums = dict.fromkeys(("all", *map(str, KEPT)), 0.0)
    for window in windows:
        expected, found = (m(window[None]).logits[0].float() for m in (base, model))
        sums["all"] += float(full_divergence(expected, found).sum())
        for k in KEPT:
            sums[str(k)] += float(divergence(found, top_answers(expected, k)).sum())
    tokens = sum(map(len, windows))
    return {name: value / tokens for name, value in sums.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    arguments = parser.parse_args()
    source = loading.resolve_model(arguments.base)
    base = load_dequantized(source, CPU)
    tokenizer = loading.load_tokenizer(source)
    windows = build_calibration_set(tokenizer, scales=LENGTHS, tokens=TOKENS).sequences
    cells = []
    for path in arguments.checkpoints:
        found = measure(base, load_dequantized(str(path), CPU), windows)
        lost = {str(k): 1 - found[str(k)] / found["all"] for k in KEPT}
        cells.append({"checkpoint": path.name, "kl": found, "lost": lost})
        print(path.name, found, lost)
    about = {"machine": record.machine(CPU), "versions": record.versions()}
    RESULTS.write_text(json.dumps({**about, "checkpoints": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
