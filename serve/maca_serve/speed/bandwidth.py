"""How fast this machine copies memory: decoding, which reads all weights per token, is held to it.

Read and written bytes are both counted, as in STREAM's copy.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from maca_serve.common.errors import UserError
from maca_serve.common.machine import physical_cpus
from maca_serve.engine.process import SAFE_PATH

# Far larger than any cache that a copy could stay in.
ARRAY_BYTES = 512 * 1024**2
ATTEMPTS = 7


def copy_bandwidth(vllm_version: str, ranks: int = 1) -> dict[str, Any]:
    """The best of some copies of a large array, on what the engine computes on.

    Args:
        vllm_version: of the installed vLLM; one with `cpu` in it is a CPU build.
        ranks: of the engine; on CUDA each has a card of its own, taken to be like the first.

    Returns:
        {"bytes_per_s", "on"}.

    Raises:
        UserError: the card cannot be used.
    """
    if "cpu" in vllm_version:
        threads = len(physical_cpus())
        return {"bytes_per_s": _on_cpu(threads), "on": f"CPU, {threads} threads"}
    # In a process of its own, whose CUDA context takes no memory from the engines.
    command = [sys.executable, "-m", "maca_serve.speed.bandwidth"]
    environment = {**os.environ, **SAFE_PATH}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if child.returncode:
        last = (child.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"the card's copy bandwidth cannot be measured: {last}")
    card = json.loads(child.stdout)
    on = card["on"] if ranks == 1 else f"{ranks} x {card['on']}"
    return {"bytes_per_s": ranks * card["bytes_per_s"], "on": on}


def _on_cpu(threads: int) -> float:
    source = np.ones(ARRAY_BYTES // 8)
    target = np.zeros_like(source)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return _best(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))


def _on_cuda() -> dict[str, Any]:
    import torch

    source = torch.ones(ARRAY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return {"bytes_per_s": _best(copy), "on": torch.cuda.get_device_name()}


def _best(copy: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ATTEMPTS):
        began = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - began)
    return 2 * ARRAY_BYTES / min(seconds)


if __name__ == "__main__":
    print(json.dumps(_on_cuda()))  # noqa: T201
