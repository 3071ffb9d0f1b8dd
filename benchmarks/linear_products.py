"""How fast are Linears of bfloat16 on this CPU, and as float32 products rounded once?

    .venv/bin/python benchmarks/linear_products.py   # writes results/linear_products.json

``maca_llmc.common.device.fast_linears`` takes the second way where torch has AVX2 only. One thread,
alternating, the best of each; shapes are those of SmolLM2-135M and Qwen2.5 0.5B, heads included.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from tables import markdown

from maca_llmc.common import record
from maca_llmc.common.device import Float32Linears

RESULT = Path(__file__).parent / "results" / "linear_products.json"
SHAPES = ((2048, 576, 1536), (512, 896, 4864), (96, 896, 151936), (16, 576, 1536), (1, 576, 1536))
WAYS: dict[str, Callable] = {"bfloat16": nullcontext, "float32, rounded": Float32Linears}
ROUNDS = 7


@torch.no_grad()
def measure() -> list[dict]:
    """GFLOP/s of each way, and the share of outputs that differ."""
    torch.manual_seed(0)
    found = []
    for tokens, inputs, outputs in SHAPES:
        module = torch.nn.Linear(inputs, outputs, bias=False).bfloat16()
        rows = torch.randn(tokens, inputs).bfloat16()
        best, results = dict.fromkeys(WAYS, float("inf")), {}
        for _ in range(ROUNDS):
            for name, way in WAYS.items():
                with way():
                    start = time.perf_counter()
                    results[name] = module(rows)
                    best[name] = min(best[name], time.perf_counter() - start)
        one, other = results.values()
        flop = 2 * tokens * inputs * outputs
        speeds = {name: flop / seconds / 1e9 for name, seconds in best.items()}
        differ = float((one != other).float().mean())
        found.append({"shape": [tokens, inputs, outputs], "gflops": speeds, "differ": differ})
    return found


def main() -> None:
    """Measure, print a table, write the result."""
    torch.set_num_threads(1)
    found = measure()
    rows = [["tokens x in x out", *(f"{name}, GFLOP/s" for name in WAYS), "outputs that differ"]]
    for case in found:
        shape = " x ".join(map(str, case["shape"]))
        speeds = [f"{speed:.1f}" for speed in case["gflops"].values()]
        rows.append([shape, *speeds, f"{case['differ']:.2%}"])
    print(markdown(rows))
    capability = torch.backends.cpu.get_cpu_capability()
    machine = record.machine() | {"torch_capability": capability}
    content = {"machine": machine, "versions": record.versions(), "cases": found}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
