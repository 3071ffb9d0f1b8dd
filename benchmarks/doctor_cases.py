"""Checkpoints to hold the doctor to: many schemes, two shapes, tiny random weights.

    .venv/bin/python benchmarks/doctor_cases.py FOLDER     # in the quantize environment

Written by llm-compressor's own QuantizationModifier (round to nearest), so that formats are those
that users have. ``doctor_agreement.py`` runs this.
"""

import sys
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from maca_llmc import models

EVEN = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
ODD = {"hidden_size": 240, "intermediate_size": 496, "head_dim": 64}
"""Widths that 16 divides and 32 does not."""


def weights(bits: int, group: int | None, symmetric: bool = True, **activations: dict) -> dict:
    """Fields of the modifier for integer weights."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = {"targets": ["Linear"], **activations}
    scheme["weights"] = {"num_bits": bits, "symmetric": symmetric, **strategy}
    return {"config_groups": {"group_0": scheme}}


TOKENWISE = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
CASES = {
    "w4a16-g32": (weights(4, 32), EVEN),
    "w4a16-g16": (weights(4, 16), EVEN),
    "w4a16-channel": (weights(4, None), EVEN),
    "w4a16-asymmetric-g64": (weights(4, 64, symmetric=False), EVEN),
    "w4a16-channel-odd": (weights(4, None), ODD),
    "w8a8": ({"scheme": "W8A8"}, EVEN),
    "w8a8-odd": ({"scheme": "W8A8"}, ODD),
    "w4a8-g32": (weights(4, 32, input_activations=TOKENWISE), EVEN),
    "fp8-dynamic": ({"scheme": "FP8_DYNAMIC"}, EVEN),
    "fp8-static": ({"scheme": "FP8"}, EVEN),
    "fp8-block": ({"scheme": "FP8_BLOCK"}, EVEN),
    "w8a16-channel": (weights(8, None), EVEN),
    "w3a16-g64": (weights(3, 64), EVEN),
    "w2a16-g64": (weights(2, 64), EVEN),
    "nvfp4": ({"scheme": "NVFP4"}, EVEN),
    "mxfp4a16": ({"scheme": "MXFP4A16"}, EVEN),
}


def make(folder: Path, fields: dict, shape: dict) -> None:
    """One checkpoint, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(models.resolve_model("smollm2-135m-instruct"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **shape,
    )
    base = folder.parent / ".base"  # llm-compressor copies what stands beside a model's weights
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.randint(0, len(tokenizer), (4, 64))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=DataLoader(rows, batch_size=None),
        recipe=QuantizationModifier(ignore=["lm_head"], **fields),
        output_dir=str(folder),
    )


def main() -> None:
    """Make what is missing."""
    folder = Path(sys.argv[1])
    for name, (fields, shape) in tqdm(CASES.items(), desc="checkpoints"):
        if not (folder / name / "model.safetensors").is_file():
            make(folder / name, fields, shape)


if __name__ == "__main__":
    main()
