"""What quantization does to the first token, an attention sink, and to all others, layer by layer.

    .venv/bin/python benchmarks/sink_errors.py CHECKPOINTS --methods gptq-2048 hs-gptq-2048

For each method of the grid (``accuracy_arms.py``) the model is quantized as ``accuracy.py`` does,
into a folder of CHECKPOINTS where it is not there yet, and run on windows of the evaluation text.
After each layer: the norm of the hidden state at the first position against the base model's, and
squared error over squared norm, at the first position and (averaged over tokens) at all others.
Adds to ``benchmarks/results/sink_errors.json``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accuracy import EVALUATION, quantize
from accuracy_arms import HERE, KEY, METHODS, SCHEMES, identity

from maca_llmc.common import record
from maca_llmc.data import build_calibration_set
from maca_llmc.evaluation.divergence import load_dequantized
from maca_llmc.llmcompressor_api import decoder_layers
from maca_llmc.model import loading

RESULT = HERE / "results" / "sink_errors.json"
LENGTH, TOKENS = 512, 8192


@torch.no_grad()
def hidden_states(model: Any, batches: list[Any]) -> list[torch.Tensor]:
    """What each layer gives, ``[windows, LENGTH, d]``."""
    layers = decoder_layers(model)
    found: list[list[torch.Tensor]] = [[] for _ in layers]

    def keep(place: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[place].append(hidden.float().cpu())

    for place, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, place=place: keep(place, output))
    for batch in batches:
        model(**batch, logits_to_keep=1)
    return [torch.cat(parts) for parts in found]


def compare(base: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """One layer's errors."""
    error, energy = (other - base).square().sum(-1), base.square().sum(-1)
    return {
        "base_norm_first_over_median": float(energy[:, 0].mean().sqrt() / energy.sqrt().median()),
        "norm_first": float(other[:, 0].norm() / base[:, 0].norm()),
        "error_first": float(error[:, 0].sum() / energy[:, 0].sum()),
        "error_others": float((error[:, 1:] / energy[:, 1:]).mean()),
    }


def measure(model: str, cells: list[dict], checkpoints: Path) -> dict[str, list[dict]]:
    """By method, each layer's errors."""
    source = loading.resolve_model(model)
    tokenizer = loading.load_tokenizer(source)
    data = build_calibration_set(tokenizer, source=EVALUATION, scales=(LENGTH,), tokens=TOKENS)
    batches = list(data.dataloader(2048))

    def run(folder: str | Path) -> list[torch.Tensor]:
        return hidden_states(load_dequantized(str(folder), torch.device("cpu")), batches)

    base = run(source)
    found = {}
    for cell in cells:
        folder = checkpoints / "-".join(map(str, identity(cell)))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            quantize(cell, model, folder)
        found[cell["method"]] = [compare(*pair) for pair in zip(base, run(checkpoint), strict=True)]
    return found


def main() -> None:
    """Measure and add to the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, help="folder to keep checkpoints in")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--scheme", default="w3-g32", choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", required=True, choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    content = json.loads(RESULT.read_text()) if RESULT.exists() else {"layers": {}}
    model = Path(arguments.model).name
    cells = [
        dict(zip(KEY, (model, arguments.scheme, method, arguments.seed), strict=True))
        for method in arguments.methods
    ]
    found = measure(arguments.model, cells, arguments.checkpoints)
    name = f"{model} {arguments.scheme} seed {arguments.seed}"
    content["layers"].setdefault(name, {}).update(found)
    content |= {"machine": record.machine(), "versions": record.versions()}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
