"""Make what the serve side's real-engine tests load: run in the quantize environment.

    .venv/bin/python tests/support/make_checkpoints.py FOLDER

FOLDER gets ``base`` (the embedded model), ``w4a16``, ``w3-in-4`` (3-bit weights in 4-bit
containers), ``w8a8``, and ``reference.json``: the log-probabilities that transformers gives prompt
tokens, on the first three's dequantized weights in bfloat16, and by how much those differ from
float32. The two sides share no code; they meet in these folders.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import maca_llmc
from maca_llmc.common.defaults import EVALUATION_SAMPLE
from maca_llmc.data import read_documents
from maca_llmc.model.smollm2 import embedded_model

ROOT = Path(__file__).parents[2]
PROMPT_LENGTHS = (16, 64, 200)
FEW = {"tokens": 1024, "lengths": (128, 256)}


@torch.no_grad()
def prompt_log_probabilities(model, ids: list[int]) -> list[float]:
    """Log-probability of each token of a prompt but the first."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    targets = torch.tensor(ids[1:])[:, None]
    return logits.log_softmax(-1).gather(1, targets)[:, 0].tolist()


def mean_difference(some: list[list[float]], others: list[list[float]]) -> float:
    """Mean absolute difference over all tokens of all prompts, nats."""
    differences = [
        abs(one - other)
        for prompt, same in zip(some, others, strict=True)
        for one, other in zip(prompt, same, strict=True)
    ]
    return sum(differences) / len(differences)


def main(folder: Path) -> None:
    """Make whatever of it is missing."""
    if (folder / "reference.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        base.symlink_to(embedded_model())
    for name, recipe, container in (
        ("w4a16", "w4a16-g64.maca.yaml", None),
        ("w3-in-4", "w3a16-g64.maca.yaml", 4),
        ("w8a8", "w8a8.maca.yaml", None),
    ):
        path = ROOT / "recipes" / recipe
        maca_llmc.quantize(folder / name, recipe=path, container=container, overwrite=True, **FEW)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = read_documents(EVALUATION_SAMPLE)[0]
    prompts = [tokenizer(text)["input_ids"][:length] for length in PROMPT_LENGTHS]
    reference = {"prompts": prompts, "log_probabilities": {}, "noise": {}}
    for name in ("base", "w4a16", "w3-in-4"):
        extra = (
            {}
            if name == "base"
            else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        )
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16, **extra)
        rounded = [prompt_log_probabilities(model.eval(), ids) for ids in prompts]
        exact = [prompt_log_probabilities(model.float(), ids) for ids in prompts]
        reference["log_probabilities"][name] = rounded
        reference["noise"][name] = mean_difference(rounded, exact)
    (folder / "reference.json").write_text(json.dumps(reference))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
