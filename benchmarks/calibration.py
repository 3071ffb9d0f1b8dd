"""What calibration costs, against stock llm-compressor: time by phase, memory, growth.

    .venv/bin/python benchmarks/calibration.py     # all, half an hour on two cores
    .venv/bin/python benchmarks/calibration.py fixed-512 moe  # some; other results stay

Writes ``benchmarks/results/calibration.json`` after every case and prints tables in Markdown.
Every run is a process of its own (``calibration_child.py``); the arms of a case alternate, and the
medians of their runs are compared. Models are cut to a few of their layers, which are all alike:
both arms of a case are cut in the same way. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
from shapes import LLAMA_8B
from tables import markdown
from tqdm import tqdm

from maca_llmc.common import record
from maca_llmc.model.smollm2 import embedded_model

HERE = Path(__file__).parent
RESULT = HERE / "results" / "calibration.json"
THREADS = 2
REPEATS = 3
GROWTH = ("tokens", "lengths")
"""Cases run once: what is read off them is the slope through several points."""

BATCH_TOKENS = 2048

W4_GROUP_64 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
MIXED = [2048] * 2 + [1024] * 4 + [512] * 8 + [128] * 32
LLAMA = {
    "vocab_size": 4096,
    "num_hidden_layers": 1,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
SIZES = {
    width: LLAMA
    | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
    }
    for width in (512, 1024, 2048)
}
LAYER_8B = {"vocab_size": 4096, "num_hidden_layers": 1, **LLAMA_8B}
MOE = {
    "vocab_size": 4096,
    "num_hidden_layers": 1,
    "hidden_size": 2048,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}


def arms(lengths: list[int], **common) -> dict:
    """Stock and ours, on the same data."""
    return {
        "stock": {"method": "stock", "lengths": lengths, **common},
        "ours": {"method": "ours", "lengths": lengths, **common},
    }


def cuda_cases() -> dict:
    """What there is no sense in without a GPU."""
    layer = {"model": "llama", "shape": LAYER_8B, "accumulate_only": True, "device": "cuda"}
    return {"layer-8b": arms([2048] * 128, **layer, batch_tokens=8 * 2048)}


def cases() -> dict:
    """By name: the arms of each case that this machine can run."""
    embedded = {"model": str(embedded_model())}
    ours = {"method": "ours", **embedded}
    return {
        "fixed-512": arms([512] * 16, **embedded, layers=6),
        "fixed-2048": arms([2048] * 16, **embedded, layers=3),
        "scales": {
            "single": {**ours, "lengths": [2048] * 8, "layers": 6},
            "several": {**ours, "lengths": MIXED, "layers": 6},
            "nested": {
                **ours,
                "lengths": [2048] * 8,
                "layers": 6,
                "fields": {"nested_scales": [128, 256, 512, 1024]},
            },
        },
        "search": arms([2048] * 8, **embedded, layers=6)
        | {
            "ours, scales searched": {
                **ours,
                "lengths": [2048] * 8,
                "layers": 6,
                "fields": {"hessian_scales": True},
            },
        },
        "memory": arms([8192] * 8, **embedded, layers=1)
        | {
            f"ours, {count} x 8192": {**ours, "lengths": [8192] * count, "layers": 1}
            for count in (2, 4)
        },
        "moe": arms([512] * 4, model="qwen3_moe", shape=MOE, accumulate_only=True),
        "tokens": {
            f"{count} x 512": {**ours, "lengths": [512] * count, "layers": 2}
            for count in (8, 16, 32, 64)
        },
        "lengths": {
            f"{16384 // length} x {length}": {
                **ours,
                "lengths": [length] * (16384 // length),
                "layers": 2,
            }
            for length in (512, 1024, 2048, 4096, 8192)
        },
        "sizes": {
            f"{width} wide, {dtype}": {
                "method": "ours",
                "model": "llama",
                "shape": SIZES[width],
                "dtype": dtype,
                "lengths": [512] * 16,
            }
            for width, dtype in [*((width, "bfloat16") for width in SIZES), (2048, "float32")]
        },
        **(cuda_cases() if torch.cuda.is_available() else {}),
    }


def run_child(case: dict) -> dict:
    """Result of one run in a process of its own."""
    # on the CPU also where there is a GPU, unless the case says otherwise
    hidden = {} if case.get("device") == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    common = {"threads": THREADS, "device": "cpu", "batch_tokens": BATCH_TOKENS}
    done = subprocess.run(
        [sys.executable, HERE / "calibration_child.py"],
        input=json.dumps({"scheme": W4_GROUP_64, **common, **case}),
        capture_output=True,
        text=True,
        env=os.environ
        | {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": str(THREADS), **hidden},
    )
    if done.returncode:
        sys.exit(f"a run failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_case(name: str, by_arm: dict) -> dict:
    """Runs of each arm, alternating."""
    runs: dict[str, list] = {arm: [] for arm in by_arm}
    repeats = 1 if name in GROWTH else REPEATS
    bar = tqdm(total=repeats * len(by_arm), desc=name)
    for _ in range(repeats):
        for arm, case in by_arm.items():
            runs[arm].append(run_child(case))
            bar.update()
    bar.close()
    return {arm: {"case": described(by_arm[arm]), "runs": runs[arm]} for arm in by_arm}


def described(case: dict) -> dict:
    """A case as the result keeps it: a model's name, not where it lay on this machine."""
    return {**case, "model": Path(case["model"]).name}


def best_square_product() -> dict:
    """GFLOP/s of the fastest of several products of 2048 x 2048 matrices, by dtype."""
    torch.set_num_threads(THREADS)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(2048, 2048).to(dtype)
        least = float("inf")
        for _ in range(12):
            start = time.perf_counter()
            matrix @ matrix
            least = min(least, time.perf_counter() - start)
        found[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / least / 1e9
    return found


def median(arm: dict, *path: str) -> float:
    """Of a number over the runs of an arm."""
    values = []
    for value in arm["runs"]:
        for key in path:
            value = value.get(key, 0.0)
        values.append(value)
    return statistics.median(values)


def useful_share(arm: dict, best: dict) -> float:
    """FLOP/s of forward and Hessian over those of the best product of the dtype."""
    flops = statistics.median(run["forward_flops"] + run["hessian_flops"] for run in arm["runs"])
    seconds = median(arm, "seconds", "forward") + median(arm, "seconds", "hessian")
    return flops / seconds / 1e9 / best[arm["case"].get("dtype", "bfloat16")]


PHASES = ("forward", "hessian", "factorise", "sweep", "losses", "other solve", "save")


def table(results: dict) -> str:
    """All cases: a row per arm."""
    heads = ["case", "arm", "wall s", *(f"{phase} s" for phase in PHASES)]
    heads += ["tokens/s", "MB above weights", "share of GEMM", "against the first arm"]
    rows = [heads]
    for name, by_arm in results["cases"].items():
        first = next(iter(by_arm.values()))
        for label, arm in by_arm.items():
            wall, tokens = median(arm, "wall"), sum(arm["case"]["lengths"])
            row = [name, label, f"{wall:.1f}"]
            row += [f"{median(arm, 'seconds', phase):.1f}" for phase in PHASES]
            row += [f"{tokens / wall:.0f}", f"{median(arm, 'rss_above_weights') / 1e6:.0f}"]
            row += [f"{useful_share(arm, results['best_square_gflops'][name]):.0%}"]
            row += [f"{wall / median(first, 'wall'):.3f}"]
            rows.append(row)
    return markdown(rows)


def exponent(by_arm: dict, sizes: list[int], *path: str) -> float:
    """p of the power law ``size^p`` that fits the medians best."""
    values = [median(arm, *path) for arm in by_arm.values()]
    return float(numpy.polyfit(numpy.log(sizes), numpy.log(values), 1)[0])


def targets(results: dict) -> str:
    """What was to be reached, and what was."""
    cases, best = results["cases"], results["best_square_gflops"]
    rows = [["what", "to reach", "measured"]]

    def ratio(name, one, other, *path):
        return median(cases[name][one], *path) / median(cases[name][other], *path)

    def above(name, one, other):
        return f"{ratio(name, one, other, 'rss_above_weights'):.3f}"

    if "fixed-512" in cases:
        found = f"{ratio('fixed-512', 'ours', 'stock', 'wall'):.3f}"
        rows.append(["16 x 512 tokens, wall against stock", "at most 0.25", found])
    if "fixed-2048" in cases:
        found = f"{ratio('fixed-2048', 'ours', 'stock', 'wall'):.3f}"
        rows.append(["16 x 2048 tokens, wall against stock", "at most 0.33", found])
    if "scales" in cases:
        for arm in ("several", "nested"):
            found = f"{ratio('scales', arm, 'single', 'wall'):.3f}"
            rows.append([f"{arm} scales against one, same tokens", "at most 1.05", found])
    if "memory" in cases:
        what = "8 x 8192 tokens, memory above weights against stock"
        rows.append([what, "at most 0.25", above("memory", "ours", "stock")])
        for count in (2, 4):
            what = f"{count} x 8192 tokens against 8 x 8192, memory"
            rows.append([what, "linear", above("memory", f"ours, {count} x 8192", "ours")])
    if "moe" in cases:
        stock, ours = (cases["moe"][arm]["runs"][0]["hessian_flops_done"] for arm in arms([]))
        rows.append(["experts: FLOPs for Hessians", "at most 0.125", f"{ours / stock:.3f}"])
        found = f"{ratio('moe', 'ours', 'stock', 'seconds', 'hessian'):.3f}"
        rows.append(["experts: time for Hessians", "at most 0.125", found])
    if "layer-8b" in cases:
        found = f"{ratio('layer-8b', 'ours', 'stock', 'seconds', 'hessian'):.3f}"
        rows.append(["8B layer on CUDA, time for Hessians", "at most 0.2", found])
    if "sizes" in cases:
        for label, arm in cases["sizes"].items():
            what = f"forward and Hessian, share of the best product, {label}"
            rows.append([what, "at least 60 %", f"{useful_share(arm, best['sizes']):.0%}"])
        halves = {k: v for k, v in cases["sizes"].items() if "bfloat16" in k}
        found = f"{exponent(halves, list(SIZES), 'wall'):.2f}"
        rows.append(["growth of wall time with the width", "3", found])
    if "tokens" in cases:
        found = f"{exponent(cases['tokens'], [8, 16, 32, 64], 'seconds', 'forward'):.2f}"
        rows.append(["growth of forward time with the tokens", "1", found])
        found = f"{exponent(cases['tokens'], [8, 16, 32, 64], 'seconds', 'hessian'):.2f}"
        rows.append(["growth of Hessian time with the tokens", "1", found])
    if "lengths" in cases:
        lengths = [512, 1024, 2048, 4096, 8192]
        found = f"{exponent(cases['lengths'], lengths, 'wall'):.2f}"
        rows.append(["growth of wall time with the length, same tokens", "below 1", found])
    return markdown(rows)


def main() -> None:
    """Run the named cases, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*cases(), []])
    wanted = parser.parse_args().cases or list(cases())
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"cases": {}}
    results.setdefault("machines", {})
    results.setdefault("best_square_gflops", {})
    for name in wanted:
        made = {"threads": THREADS, "versions": record.versions()}
        results["machines"][name] = record.machine() | made
        results["best_square_gflops"][name] = best_square_product()
        results["cases"][name] = run_case(name, cases()[name])
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results), targets(results), sep="\n\n")


if __name__ == "__main__":
    main()
