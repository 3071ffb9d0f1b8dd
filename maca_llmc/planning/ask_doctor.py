"""Which vLLM kernels would run a checkpoint: asked of the serve environment, which has vLLM."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from compressed_tensors.compressors.format import infer_module_format
from rich.console import Console
from torch import nn

from maca_llmc.recipe.targets import linear_widths
from maca_llmc.run.prepare import Run

TARGETS = {
    "this machine": "here",
    "compute capability 8.0 (A100)": "80",
    "compute capability 8.9 (L40S, RTX 4090)": "89",
    "compute capability 9.0 (H100)": "90",
    "compute capability 12.0 (RTX 5090)": "120",
}
"""What is asked about, as ``maca-serve doctor --gpu`` takes it."""

TIMEOUT = 600


def ask_kernels(run: Run) -> list[dict[str, Any]]:
    """The kernels that vLLM would choose here and on the usual GPUs.

    :return: per target its ``target``, ``verdict`` (``loads`` or what is wrong), ``kernels`` (how
        many layers each would run), ``remarks`` (what else the doctor says, for instance that a
        kernel was slower than 16 bits on such a machine) and ``changes`` (what would help where
        none is fit, with the kernels that would be chosen then); or ``unknown`` with the reason
    """
    doctor = find_doctor()
    if doctor is None:
        return [
            {
                "target": "any",
                "unknown": "no serve environment: run `make setup`, or put maca-serve on the PATH",
            }
        ]
    with tempfile.TemporaryDirectory() as folder:
        shapes = Path(folder) / "shapes.json"
        shapes.write_text(json.dumps(checkpoint_to_be(run)), encoding="utf-8")
        return _ask(doctor, shapes)


def find_doctor() -> Path | None:
    """``maca-serve`` on the PATH, or in the checkout's serve environment beside this one."""
    beside = Path(sys.prefix).parent / ".venv-serve" / "bin" / "maca-serve"
    found = shutil.which("maca-serve")
    return Path(found) if found else beside if beside.is_file() else None


def checkpoint_to_be(run: Run) -> dict[str, Any]:
    """The configuration that the checkpoint would have, and the shapes of its Linears."""
    resolved = run.modifier.resolved_config.model_copy(deep=True)
    for number, modifier in enumerate(run.modifiers[1:], start=1):
        for name, scheme in modifier.resolved_config.config_groups.items():
            resolved.config_groups[f"{number}-{name}"] = scheme.model_copy(deep=True)
    layers = {
        name: [module.out_features, module.in_features]
        for name, module in run.shapes.named_modules()
        if isinstance(module, nn.Linear)
    }
    quantized = {
        name
        for modifier in run.modifiers
        for name in linear_widths(run.shapes, modifier.resolved_targets, modifier.ignore)
    }
    formats = set()
    for scheme in resolved.config_groups.values():
        scheme.format = scheme.format or infer_module_format(nn.Linear, scheme)
        formats.add(scheme.format)
        if run.container and scheme.weights.num_bits < run.container:
            scheme.weights.num_bits = run.container
    quantization = json.loads(resolved.model_dump_json()) | {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": [name for name in layers if name not in quantized],
    }

    config = json.loads(run.config.to_json_string(use_diff=False))
    return {"config": config | {"quantization_config": quantization}, "layers": layers}


def _ask(doctor: Path, shapes: Path) -> list[dict[str, Any]]:
    """An entry for each target, or one that says why there is none."""
    gpus = ",".join(TARGETS.values())
    command = [str(doctor), "doctor", "--shapes", str(shapes), "--json", "--gpu", gpus]
    try:
        with Console(stderr=True).status("asking vLLM for its kernels"):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
                # nothing that it starts takes modules from the current folder
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        answers = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return [{"target": "any", "unknown": f"no answer within {TIMEOUT} s"}]
    except ValueError:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else "maca-serve doctor said nothing"
        return [{"target": "any", "unknown": why}]
    return [_entry(target, answer) for target, answer in zip(TARGETS, answers, strict=True)]


def _entry(target: str, answer: dict[str, Any]) -> dict[str, Any]:
    kernels: Counter[str] = Counter()
    for layer in answer["layers"]:
        if layer["quantized"]:
            kernels[_kernel(layer)] += layer["count"]
    return {
        "target": target,
        "verdict": answer["verdict"],
        "kernels": dict(kernels),
        "remarks": [problem["what"] for problem in answer["problems"]],
        "changes": answer["changes"],
    }


def _kernel(layer: dict[str, Any]) -> str:
    chosen, better = layer["kernel"] or "none", layer["with_packages"]
    if not better:
        return chosen
    return f"{chosen}, or {better['kernel']} with {' and '.join(better['install'])}"
