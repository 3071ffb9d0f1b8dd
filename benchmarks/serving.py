"""How fast vLLM serves low-bit checkpoints, against BF16 in the same run, and where that ends.

    .venv-serve/bin/python benchmarks/serving.py             # about 50 minutes on two cores

Two models: SmolLM2-135M (the demo's checkpoints, made here where they are missing), and one of
Llama-3-8B's layer shape with random weights, with 4 layers on a CPU and 32 on a card. BF16 gets the
best thread binding that was tried. ``benchmarks/results/serving-KIND.json``, KIND being the kind of
machine, is written after every model; a model that is in it already is not measured again, so that
the same command goes on after an interruption. Delete the file to begin anew.

``--publish`` measures nothing: it writes what all result files say of kernels against BF16 into
``serve/maca_serve/assets/kernel_speeds.json``, from which ``maca-serve doctor`` warns.

W4A16 on a CPU with AMX is measured twice: as it is, and as plain ``vllm serve`` runs it there, with
activations rounded to 8 bits (``VLLM_CPU_INT4_W4A8=1``), which is another model. FP8 on a CPU is
measured on the small model only: of the large one's shape vLLM 0.32 gave up its first 40 tokens
after its own limit of 300 s (tried once, on Intel, with other work on the machine).
"""

import argparse
import json
import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from maca_serve.common.machine import describe_machine, physical_cpus, require_vllm
from maca_serve.common.results import write_json
from maca_serve.doctor import diagnose
from maca_serve.doctor.speeds import FILE as SPEEDS
from maca_serve.doctor.speeds import kind
from maca_serve.engine.fit import Fit, fit
from maca_serve.formats.checkpoint import open_all
from maca_serve.measuring.measure import measure
from maca_serve.measuring.settings import SpeedSettings
from maca_serve.reporting.speed_view import Grid, speed_grids
from maca_serve.speed.breakeven import describe_loads
from maca_serve.speed.loads import Load
from random_checkpoints import make
from tables import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MADE = ROOT / "runs" / "serving"
QUANTIZE = ROOT / ".venv" / "bin" / "maca-llmc"
RECIPES = {
    "w8a8": "w8a8.maca.yaml",
    "w4a16": "w4a16-g64.maca.yaml",
    "w3a16": "w3a16-g64.maca.yaml",
    "w2a16": "w2a16-g64.maca.yaml",
    "fp8": "../benchmarks/fp8-dynamic.yaml",
}
# What `make demo` leaves.
DEMO = {"bf16": "base", "w8a8": "maca-w8a8", "w4a16": "maca"}
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
REAL, SHAPED = "SmolLM2-135M", "8B-shaped"
IN_WORDS = {REAL: REAL, SHAPED: "layers like Llama-3-8B's"}


class Batches(SpeedSettings):
    """Runs of one full batch, after one as warm-up: engine starts take the most time as it is."""

    def prompts_under(self, load: Load) -> int:
        """As many as are in flight."""
        return load.concurrency or super().prompts_under(load)


@dataclass(frozen=True)
class Arm:
    """A checkpoint under one name, with what is set in its engine's environment."""

    name: str
    scheme: str
    environment: dict[str, str] = field(default_factory=dict)


ARMS = {
    "cpu": {
        REAL: [Arm(n.upper(), n) for n in ("bf16", "w8a8", "w4a16", "fp8")],
        SHAPED: [
            *(Arm(n.upper(), n) for n in ("bf16", "w8a8", "w4a16")),
            Arm("W4A16 as W4A8", "w4a16", {"VLLM_CPU_INT4_W4A8": "1"}),
        ],
    },
    "cuda": {
        REAL: [Arm(n.upper(), n) for n in ("bf16", "w8a8", "fp8", "w4a16", "w3a16", "w2a16")],
        SHAPED: [Arm(n.upper(), n) for n in ("bf16", "w8a8", "fp8", "w4a16", "w3a16", "w2a16")],
    },
}


def folder_of(model: str, scheme: str, layers: int) -> Path:
    """A checkpoint, made where it is missing."""
    if model == SHAPED:
        tokenizer = folder_of(REAL, "bf16", layers)
        return make(MADE / f"8b-{layers}-{scheme}", scheme, layers, tokenizer)
    demo = ROOT / "runs" / "demo" / DEMO.get(scheme, "none")
    folder = demo if demo.is_dir() else MADE / f"smollm2-{scheme}"
    if not folder.is_dir():
        command = [QUANTIZE, "embedded-model", folder]
        if scheme != "bf16":
            command = [QUANTIZE, "quantize", "--output", folder, "--tokens", "4096"]
            command += ["--recipe", ROOT / "recipes" / RECIPES[scheme], "--lengths", "128,256"]
        subprocess.run([str(part) for part in command], check=True)
    return folder


def runnable(arms: list[tuple[Arm, Path]]) -> tuple[list[tuple[Arm, Path]], dict[str, str]]:
    """Those that vLLM would load here, and why it would not load the others."""
    kept, skipped = [], {}
    for arm, folder in arms:
        found = diagnose(folder) if arm.scheme != "bf16" else {"verdict": "loads"}
        if found["verdict"] == "loads":
            kept.append((arm, folder))
        else:
            skipped[arm.name] = (found["problems"] or [{"what": found["verdict"]}])[0]["what"]
    return kept, skipped


def try_bindings(folder: Path, settings: SpeedSettings, bindings: list[str]) -> dict[str, float]:
    """Output tokens per second of BF16 alone under each thread binding, the best first."""
    version = require_vllm()
    brief = replace(settings, concurrency=(1,), input_len=settings.input_len[:1], repeats=1)
    (checkpoint,) = open_all([folder], ["BF16"])
    found = {}
    for binding in bindings:
        chosen = fit(checkpoint, version, measured=brief.longest)
        bound = Fit(chosen.arguments, {**chosen.environment, BINDING: binding})
        entry = measure([checkpoint], None, brief, [bound])["checkpoints"][0]
        run = entry["throughput"][str(brief.input_len[0])]["1"]
        found[binding] = run["output_tokens_per_s"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_model(
    model: str, arms: list[Arm], layers: int, settings: SpeedSettings, bindings: list[str]
) -> dict:
    """All arms of one model, in one run."""
    version = require_vllm()
    kept, skipped = runnable([(arm, folder_of(model, arm.scheme, layers)) for arm in arms])
    tried = try_bindings(kept[0][1], settings, bindings) if len(bindings) > 1 else {}
    best = next(iter(tried or bindings), None)
    checkpoints = open_all([folder for _, folder in kept], [arm.name for arm, _ in kept])
    fits = []
    for checkpoint, (arm, _) in zip(checkpoints, kept, strict=True):
        chosen = fit(checkpoint, version, measured=settings.longest)
        own = {BINDING: best} if best and arm.scheme == "bf16" else {}
        environment = {**chosen.environment, **arm.environment, **own}
        fits.append(Fit(chosen.arguments, environment))
    results = measure(checkpoints, None, settings, fits)
    for entry in results["checkpoints"]:
        entry.pop("path")
    return {"skipped": skipped, "tokens_per_s_by_binding": tried, **results}


def latency_grid(results: dict) -> Grid:
    """End-to-end latency of one request against BF16's, at the shortest prompts."""
    speed = results["settings"]["speed"]
    rows = []
    for entry in results["checkpoints"]:
        runs = [
            e["throughput"][str(speed["input_len"][0])] for e in (results["checkpoints"][0], entry)
        ]
        base, own = (run["1"]["e2el_ms"]["median"] for run in runs)
        rows.append([entry["name"], entry["kernel"], f"{own / 1000:.2f}", f"{base / own:.2f}x"])
    shape = f"{speed['input_len'][0]} in, {speed['output_len']} out, 1 in flight"
    return Grid([shape, "kernel", "latency s", "against BF16"], rows)


def show(model: str, results: dict) -> None:
    """Markdown tables of one model."""
    print(f"\n### {model}\n")
    schedule = results["schedule"]
    print(f"Order {', '.join(schedule['order'])}; engines {schedule['engines']}, ", end="")
    copied = results["machine"]["copy_bandwidth"]
    print(f"{schedule['starts']} starts. Copy: {copied['bytes_per_s'] / 1e9:.1f} GB/s.\n")
    for name, reason in results["skipped"].items():
        print(f"Not measured: {name}: {reason}\n")
    for binding, speed in results["tokens_per_s_by_binding"].items():
        print(f"BF16 with `{BINDING}={binding}`: {speed:.2f} tokens/s\n")
    for grid in (latency_grid(results), *speed_grids(results)):
        print(markdown([grid.columns, *grid.rows]), end="\n\n")


def published(file: Path) -> list[dict]:
    """Ratios of output tokens per second, of arms as they are served.

    A kernel that ran both models is told of with the large one.
    """
    measured = json.loads(file.read_text())
    found: list[dict] = []
    for model in (SHAPED, REAL):
        if model not in measured:
            continue
        told = {each["kernel"] for each in found}
        speed = measured[model]["settings"]["speed"]
        machine = measured[model]["machine"]
        plain = {arm.name for arms in ARMS.values() for arm in arms[model] if not arm.environment}
        for entry in measured[model]["checkpoints"][1:]:
            if entry["name"] not in plain or entry["kernel"] in told:
                continue
            loads = describe_loads(entry["break_even"]["ratios"])
            said = {
                "kernel": entry["kernel"],
                "machine": ", ".join(machine["gpus"]) or cpu_in_words(machine),
                "like": kind(machine),
                "model": IN_WORDS[model],
                "tokens": f"{' or '.join(map(str, speed['input_len']))} in, {speed['output_len']}",
                "ratios": {load: round(each["ratio"], 3) for load, each in loads.items()},
                "source": f"benchmarks/results/{file.name}",
            }
            found.append(said)
    return found


def publish(folder: Path) -> None:
    """Write what the doctor warns from; BF16 of each file is the base of its ratios."""
    found = [entry for file in sorted(folder.glob("serving-*.json")) for entry in published(file)]
    target = ROOT / "serve" / "maca_serve" / SPEEDS
    target.write_text(json.dumps(found, indent=1) + "\n")


def cpu_in_words(machine: dict) -> str:
    """`2 cores of AMD EPYC (AVX2)`: processors of one name differ in what they can."""
    best = last_flag(machine).upper().replace("_", " ")
    return f"{machine['cores']} cores of {machine['cpu']} ({best})"


def kind_of(machine: dict) -> str:
    """A file name's part that says what kind of machine it was."""
    if machine["gpus"]:
        return re.sub(r"[^a-z0-9]+", "-", machine["gpus"][0].split(",")[0].lower())
    flag = last_flag(machine).replace("_", "-")
    return f"cpu-{machine['cores']}-{flag}{'-zen' if has_zen_kernels() else ''}"


def last_flag(machine: dict) -> str:
    """The furthest of a CPU's instruction sets that matter here."""
    return str((machine["cpu_flags"] or ["plain"])[-1])


def has_zen_kernels() -> bool:
    """Whether vLLM takes those of zentorch: on an AMD CPU with AVX-512, where it is installed."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_zen_cpu())


def bindings_here() -> list[str]:
    """All cores, and vLLM's own two ways."""
    return [",".join(map(str, physical_cpus())), "auto", "nobind"]


def numbers(text: str) -> tuple[int, ...]:
    """`1,4` as (1, 4)."""
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Measure what the result file lacks, and print all of it."""
    cuda = "cpu" not in require_vllm()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[REAL, SHAPED], default=[SHAPED, REAL])
    parser.add_argument("--arms", nargs="+", help="some of them, e.g. BF16 W8A8; BF16 is needed")
    parser.add_argument("--bindings", nargs="*", default=[] if cuda else bindings_here())
    parser.add_argument("--layers", type=int, default=32 if cuda else 4)
    parser.add_argument(
        "--concurrency", type=numbers, default=(1, 4, 16, 64) if cuda else (1, 4, 16)
    )
    parser.add_argument("--input-len", type=numbers, default=(32, 512))
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--publish", action="store_true", help="only write the doctor's speeds")
    given = parser.parse_args()
    if given.publish:
        return publish(given.results)
    settings = Batches(given.concurrency, given.input_len, given.output_len, repeats=given.repeats)
    file = given.results / f"serving-{kind_of(describe_machine())}.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for model in given.models:
        if model in found and found[model]["settings"]["speed"] != settings.describe():
            parser.error(f"{file} holds {model} under other settings; delete it, or give --results")
        if model not in found:
            arms = ARMS["cuda" if cuda else "cpu"][model]
            arms = [arm for arm in arms if not given.arms or arm.name in given.arms]
            # What was best for the larger model is taken for the smaller: a start takes a minute.
            known = list(found.get(SHAPED, {}).get("tokens_per_s_by_binding", {}))[:1]
            bindings = known or given.bindings
            found[model] = measure_model(model, arms, given.layers, settings, bindings)
            write_json(file, found)
        show(model, found[model])


if __name__ == "__main__":
    main()
