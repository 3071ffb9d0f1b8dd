"""vLLM settings that fit the machine and the model.

On a CPU, vLLM's own defaults do not fit a small machine: it would reserve a core for itself, take
a share of all memory for the KV cache, and compile for half a minute at the first request. With
CUDA its defaults are good, and are left alone.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

from maca_serve.checkpoint import Checkpoint
from maca_serve.errors import UserError
from maca_serve.machine import available_memory, physical_cpus

GIB = 1024**3
CPU_MAX_MODEL_LEN = 8192
# Sequences of full length that the KV cache should hold at once.
SEQUENCES = 4
# Up to this many cores the engine computes on all of them; above, vLLM's own binding keeps one
# core for its scheduler, which costs little there.
BIND_ALL_UP_TO = 4

# Of a CPU engine's processes besides weights and KV cache: 1.9 GiB measured with a 135M model, 2.8
# to 3.2 GiB with layers of an 8B model's shape.
ENGINE_BYTES = 3 * GIB


@dataclass(frozen=True)
class Fit:
    """Arguments and environment for `vllm serve`.

    Attributes:
        arguments: to follow the model on the command line.
        environment: to add to this process's own.
    """

    arguments: list[str]
    environment: dict[str, str]


def fit(
    checkpoint: Checkpoint,
    vllm_version: str,
    *,
    max_model_len: int | None = None,
    measured: int | None = None,
) -> Fit:
    """Choose settings for one checkpoint on this machine.

    Args:
        checkpoint: what will be served.
        vllm_version: of the installed vLLM; one with `cpu` in it is a CPU build.
        max_model_len: tokens of prompt and output together; chosen here when None.
        measured: the longest request, prompt and output, of a measurement; then the prefix cache
            is off, so that no prompt profits from an earlier one, and vLLM is told to take one
            token more than the model's context where a prompt fills it: it wants room for an
            output token also where only the prompt's log-probabilities are read.

    Raises:
        UserError: a length beyond the model's context, or too little free memory.
    """
    if max_model_len is not None:
        _check_length(checkpoint, max_model_len)
    arguments: list[str] = []
    environment = {
        # The checkpoint is a local folder: nothing is to be fetched, nothing to be reported.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if measured is not None:
        arguments.append("--no-enable-prefix-caching")
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        if checkpoint.context is None or measured > checkpoint.context:
            max_model_len = measured
    if "cpu" in vllm_version:
        max_model_len = max_model_len or max(_usual_length(checkpoint), measured or 0)
        arguments += ["--dtype", "bfloat16", "--enforce-eager"]
        environment |= _cpu_environment(checkpoint, max_model_len)
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    return Fit(arguments, environment)


def memory_needed(checkpoint: Checkpoint, settings: Fit) -> int:
    """Bytes that a CPU engine takes: its weights, its KV cache, and the processes themselves."""
    cache = float(settings.environment["VLLM_CPU_KVCACHE_SPACE"]) * GIB
    return checkpoint.size_bytes + int(cache) + ENGINE_BYTES


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """Bytes of keys and values per token in bfloat16, over all layers.

    An upper bound for models that keep less (sliding windows, latent attention).

    Args:
        config: the language model's config.
    """
    heads = config.get("num_attention_heads") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    return 2 * 2 * (config.get("num_hidden_layers") or 0) * kv_heads * head_dim


def _usual_length(checkpoint: Checkpoint) -> int:
    return min(checkpoint.context or CPU_MAX_MODEL_LEN, CPU_MAX_MODEL_LEN)


def _check_length(checkpoint: Checkpoint, max_model_len: int) -> None:
    if max_model_len <= 0:
        raise UserError(f"--max-model-len: {max_model_len} is not positive")
    if checkpoint.context is not None and max_model_len > checkpoint.context:
        raise UserError(
            f"--max-model-len: {max_model_len} is longer than the context of"
            f" {checkpoint.path}, {checkpoint.context}"
        )


def _cpu_environment(checkpoint: Checkpoint, max_model_len: int) -> dict[str, str]:
    cache = _cache_gib(checkpoint, max_model_len)
    chosen = {
        # On a CPU with AMX vLLM would round the activations of a W4A16 checkpoint to 8 bits, which
        # is faster and another model: log-probabilities moved by 0.28 nats on average, and by
        # 0.84 with 3-bit weights in 4-bit containers, where bfloat16 noise is 0.04 and 0.09.
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(cache),
        "VLLM_CPU_OMP_THREADS_BIND": _binding(),
        # Eager mode still compiles the ranking of prompt log-probabilities, for half a minute and
        # with a C++ compiler that a serving machine need not have.
        "TORCH_COMPILE_DISABLE": "1",
    }
    # What the user set in the environment stands.
    return {name: os.environ.get(name) or value for name, value in chosen.items()}


def _cache_gib(checkpoint: Checkpoint, max_model_len: int) -> int:
    """Whole GiB for the KV cache: SEQUENCES full sequences, at most half of what is left free."""
    sequence = kv_bytes_per_token(checkpoint.text_config) * max_model_len
    left = available_memory() - checkpoint.size_bytes
    most = left // 2 // GIB
    if most < 1 or sequence > most * GIB:
        raise UserError(
            f"{checkpoint.path}: too little free memory: its weights take"
            f" {checkpoint.size_bytes / GIB:.1f} GiB and one sequence of {max_model_len} tokens"
            f" {sequence / GIB:.1f} GiB, {available_memory() / GIB:.1f} GiB are free;"
            " lower --max-model-len or free memory"
        )
    return min(most, max(1, math.ceil(SEQUENCES * sequence / GIB)))


def _binding() -> str:
    cpus = physical_cpus()
    return ",".join(map(str, cpus)) if len(cpus) <= BIND_ALL_UP_TO else "auto"
