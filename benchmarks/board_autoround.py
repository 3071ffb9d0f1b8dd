"""Quantize with AutoRound's own package, in an environment of its own (requirements/peers.txt).

    .venv-peers/bin/python benchmarks/board_autoround.py MODEL WINDOWS SCHEME OUTPUT --iters 50

WINDOWS is a safetensors file of token ids ``[windows, length]`` under ``ids``; SCHEME is JSON with
bits, group_size and sym. OUTPUT gets the model with dequantized weights.
"""

import argparse
import json
import resource
import time

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 2


def main() -> None:
    """Quantize, and print what it took as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("windows")
    parser.add_argument("scheme", type=json.loads)
    parser.add_argument("output")
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    ids = load_file(arguments.windows)["ids"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    start = time.perf_counter()
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        scheme={**arguments.scheme, "data_type": "int", "act_bits": 16},
        dataset=torch.utils.data.DataLoader(rows, batch_size=BATCH),
        nsamples=len(rows),
        seqlen=ids.shape[1],
        batch_size=BATCH,
        iters=arguments.iters,
        seed=arguments.seed,
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantizer.quantize_and_save(arguments.output, format="fake")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds, 1), "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
