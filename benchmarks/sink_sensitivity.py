"""How much an error at the first token matters in each kind of module, against one at any other.

    .venv/bin/python benchmarks/sink_sensitivity.py [--model FOLDER]

To second order, an error e in what a Linear gives for token t costs ``(g_t . e)^2 / 2`` of KL
divergence on average, g being the gradient of the cross entropy on tokens that the model draws
itself (Fisher's information). So ``|g_t|^2`` is what an error of one size costs there. The result
is its mean over first tokens over its mean over all, by kind of module: medians over the first,
middle and last third of the layers. Calibration text and lengths are the grid's
(``accuracy_arms.py``), seed 0.
Adds to ``benchmarks/results/sink_sensitivity.json``.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accuracy import CALIBRATION
from accuracy_arms import HERE, MIXED, TOKENS
from tqdm import tqdm

from maca_llmc.common import record
from maca_llmc.data import build_calibration_set
from maca_llmc.llmcompressor_api import decoder_layers
from maca_llmc.model import loading

RESULT = HERE / "results" / "sink_sensitivity.json"
SEED = 0


def squared_gradients(
    model: Any, sequences: list[torch.Tensor]
) -> dict[str, list[tuple[float, float, int]]]:
    """For each Linear of the layers and each sequence: at the first token, over all, and tokens."""
    found: dict[str, list[tuple[float, float, int]]] = {}

    def keep(name: str, gradient: torch.Tensor) -> None:
        squares = gradient[0].square().sum(dim=-1)
        found[name].append((float(squares[0]), float(squares.sum()), len(squares)))

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: keep(name, gradient))

        found[name] = []
        module.register_forward_hook(hook)

    layers = set(decoder_layers(model))
    for path, layer in model.named_modules():
        if layer in layers:
            for name, module in layer.named_modules():
                if isinstance(module, torch.nn.Linear):
                    watch(f"{path}.{name}", module)
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    generator = torch.Generator().manual_seed(SEED)
    for tokens in tqdm(sequences, desc="gradients"):
        logits = model(tokens[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return found


def by_third(found: dict[str, list[tuple[float, float, int]]]) -> dict[str, list[float]]:
    """By kind of module, the first token's ratio to the mean in each third of the layers."""
    ratios: dict[str, list[float]] = {}
    for name, sequences in found.items():
        first = statistics.fmean(first for first, _, _ in sequences)
        total, count = (sum(each) for each in list(zip(*sequences, strict=True))[1:])
        ratios.setdefault(name.rpartition(".")[2], []).append(first / (total / count))
    thirds = {}
    for kind, values in ratios.items():
        ends = [round(len(values) * part / 3) for part in range(4)]
        thirds[kind] = [statistics.median(values[slice(*pair)]) for pair in pairwise(ends)]
    return thirds


def main() -> None:
    """Measure and add to the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    source = loading.resolve_model(arguments.model)
    data = build_calibration_set(
        loading.load_tokenizer(source), source=CALIBRATION, scales=MIXED, tokens=TOKENS, seed=SEED
    )
    sequences = [row for batch in data.dataloader(1) for row in batch["input_ids"]]
    model = loading.load_model(source, loading.load_config(source), torch.float32).eval()
    content = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    content["models"][Path(arguments.model).name] = {
        "sequences": len(sequences),
        "first_over_mean": by_third(squared_gradients(model, sequences)),
        "machine": record.machine(),
    }
    content["versions"] = record.versions()
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
