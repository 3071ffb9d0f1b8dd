"""What a run leaves in its checkpoint folder: the run record and the model card."""

import json
import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from maca_llmc.common.processor import processor_name

RECORD_FILE = "maca_run.json"
CPU = torch.device("cpu")
PACKAGES = ("maca-llmc", "llmcompressor", "compressed-tensors", "transformers", "torch")

CARD = """---
{metadata}
---

# {name}

`{base}` quantized to **{scheme}** by {method} with maca-llmc, in the compressed-tensors format.

```bash
maca-serve up {name}                        # says which kernel runs, and checks the length
VLLM_CPU_INT4_W4A8=0 vllm serve ./{name}    # by hand; the variable matters on CPUs only
```

- calibration: {sequences} sequences, {tokens} tokens of {source} (count x length: {lengths}); seed
  {seed}
- `recipe.yaml` holds the recipe, `{record_file}` the run record (versions, data hash, losses)

The licence is that of the base model{license_note}.
"""


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """The machine a number was measured on.

    :param device: that was computed on
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide the result."""
    return {package: version(package) for package in PACKAGES}


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process and peak device memory, in bytes."""
    return {
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
    }


def describe_lengths(calibration: dict[str, Any]) -> str:
    """Such as ``4 x 128, 2 x 512``: how many sequences of which length.

    :param calibration: what ``CalibrationSet.record`` says
    """
    return ", ".join(f"{count} x {length}" for length, count in calibration["lengths"].items())


def finished_identity(output: Path) -> dict[str, Any] | None:
    """What run made the checkpoint in ``output``; None when there is none that says so."""
    try:
        content = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    identity: dict[str, Any] | None = content.get("identity")
    return identity


def base_license(source: str) -> str | None:
    """The licence on the base model's card, None when it has no card that can be read."""
    card = Path(source) / "README.md" if Path(source).is_dir() else source
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, HfHubHTTPError, yaml.YAMLError):
        return None


def write_card(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write the model card ``README.md`` from a run record."""
    license_name, calibration = record["license"], record["calibration"]
    tags = ["maca", "gptq"] if record["modifier"]["type"] == "MaCaModifier" else ["gptq"]
    data = ModelCardData(
        base_model=record["base_model"],
        license=license_name,
        library_name="transformers",
        tags=[*tags, "compressed-tensors", "vllm"],
    )
    text = CARD.format(
        metadata=data.to_yaml(),
        name=name,
        base=record["base_model"],
        scheme=record["scheme"],
        method=record["method"],
        sequences=calibration["sequences"],
        tokens=calibration["tokens"],
        source=calibration["source"],
        lengths=describe_lengths(calibration),
        seed=record["seed"],
        record_file=RECORD_FILE,
        license_note=f" ({license_name})" if license_name else "; its card names none",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _processor() -> str:
    """Its name and the vectors torch uses: one name stands for kinds with AVX-512 and without."""
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"
