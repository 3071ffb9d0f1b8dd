"""vLLM settings that fit the machine and the model.

On a CPU, vLLM's own defaults do not fit a small machine: it would reserve a core for itself, take
a share of all memory for the KV cache, and compile for half a minute at the first request. With
CUDA its defaults are good, and are left alone but for two: it refuses to start where the memory
does not hold one sequence of the model's full context, and is told to shorten the context instead;
and where other programs hold more of a card than it leaves free, and is told to take less.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

from maca_llmc.common.memory import available_memory
from maca_serve.common.errors import UserError
from maca_serve.common.machine import card_memory, cpu_flags, physical_cpus
from maca_serve.common.ranks import Ranks
from maca_serve.doctor.headers import VALUE_BYTES
from maca_serve.formats.checkpoint import Checkpoint

GIB = 1024**3
# On a CPU with AMX, or with zentorch, vLLM would round the activations of a W4A16 checkpoint to 8
# bits, which is faster and another model: on AMX log-probabilities moved by 0.28 nats on average,
# and by 0.84 with 3-bit weights in 4-bit containers, where bfloat16 noise is 0.04 and 0.09.
WEIGHTS_ONLY = {"VLLM_CPU_INT4_W4A8": "0"}
CACHE = "VLLM_CPU_KVCACHE_SPACE"
CPU_MAX_MODEL_LEN = 8192
# Sequences of full length that the KV cache should hold at once.
SEQUENCES = 4
# Up to this many cores a rank the engine computes on all of them; above, one core a rank is kept
# for vLLM's scheduler, as its own binding does, which costs little there.
BIND_ALL_UP_TO = 4

# vLLM takes this share of a card by default, and refuses to start where less is free. Its own CUDA
# context, about as much as CONTEXT_MIB, counts as taken by then.
CARD_SHARE = 0.92
CONTEXT_MIB = 600
LEAST_SHARE = 0.05

# Of a CPU engine's processes besides weights and KV cache: 1.9 GiB measured with a 135M model, 2.8
# to 3.2 GiB with layers of an 8B model's shape.
ENGINE_BYTES = 3 * GIB


@dataclass(frozen=True)
class Fit:
    """Arguments and environment for `vllm serve`.

    Attributes:
        arguments: to follow the model on the command line.
        environment: to add to this process's own.
        words: what was chosen, for people.
        ranks: processes that share the model.
    """

    arguments: list[str]
    environment: dict[str, str]
    words: str = ""
    ranks: int = 1


def fit(
    checkpoint: Checkpoint,
    vllm_version: str,
    *,
    max_model_len: int | None = None,
    measured: int | None = None,
    ranks: Ranks = Ranks(),
    threads: int | None = None,
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
        ranks: processes that share the model.
        threads: CPU cores to compute on, divided among the ranks; see BIND_ALL_UP_TO when None.

    Raises:
        UserError: a length beyond the model's context, too little free memory, too few cores, or
            pipeline ranks on a CPU.
    """
    if max_model_len is not None:
        _check_length(checkpoint, max_model_len)
    arguments = ranks.arguments
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
        if ranks.pipeline > 1:
            raise UserError(
                "--pp: with it vLLM's CPU build dies at the first request (0.32.0 did); use --tp"
            )
        max_model_len = max_model_len or max(_usual_length(checkpoint), measured or 0)
        arguments += ["--dtype", cpu_dtype(), "--enforce-eager"]
        environment |= _cpu_environment(checkpoint, max_model_len, ranks, threads)
    elif threads is not None:
        raise UserError("--threads: for vLLM's CPU build; this is its CUDA build")
    else:
        arguments += _card_share(ranks)
    arguments += ["--max-model-len", str(max_model_len or "auto")]
    words = _words(checkpoint, max_model_len, environment)
    return Fit(arguments, environment, words, ranks.count)


def cpu_dtype() -> str:
    """What an engine on this CPU computes in: `float32` on x86 without AVX-512, else `bfloat16`.

    There vLLM multiplies bfloat16 at a fraction of the speed of float32: a prompt of 512 tokens
    took SmolLM2-135M 15 s in bfloat16 and 3 s in float32.
    """
    flags = cpu_flags()
    return "float32" if "avx2" in flags and "avx512f" not in flags else "bfloat16"


def memory_needed(checkpoint: Checkpoint, settings: Fit) -> int:
    """Bytes that a CPU engine takes: its weights, its KV cache, and the processes themselves."""
    cache = int(float(settings.environment[CACHE]) * GIB)
    dtype = "float32" if "float32" in settings.arguments else "bfloat16"
    return _weights_bytes(checkpoint, dtype) + settings.ranks * (cache + ENGINE_BYTES)


def _weights_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """At most: in float32 what is stored in bfloat16 doubles, and codes do not."""
    return checkpoint.size_bytes * VALUE_BYTES[dtype] // VALUE_BYTES["bfloat16"]


def kv_bytes_per_token(config: dict[str, Any], dtype: str = "bfloat16") -> int:
    """Bytes of keys and values per token, over all layers.

    An upper bound for models that keep less (sliding windows, latent attention).

    Args:
        config: the language model's config.
        dtype: what they are kept in.
    """
    heads = config.get("num_attention_heads") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    values = 2 * (config.get("num_hidden_layers") or 0) * kv_heads * head_dim
    return VALUE_BYTES[dtype] * values


def _words(checkpoint: Checkpoint, max_model_len: int | None, environment: dict[str, str]) -> str:
    length = f"{max_model_len} tokens" if max_model_len else "as many tokens as the memory holds"
    if checkpoint.context is not None and checkpoint.context != max_model_len:
        length += f" (the model's context is {checkpoint.context}: --max-model-len)"
    if CACHE not in environment:
        return length
    cache, cores = (environment[f"VLLM_CPU_{n}"] for n in ("KVCACHE_SPACE", "OMP_THREADS_BIND"))
    return f"{length}, KV cache {cache} GiB, {cpu_dtype()}, cores {cores}"


def _card_share(ranks: Ranks) -> list[str]:
    """Less than vLLM's share of the cards, where other programs leave less."""
    cards = card_memory()[: ranks.count]
    share = min(((free - CONTEXT_MIB) / total for free, total in cards), default=1.0)
    if share >= CARD_SHARE:
        return []
    if share < LEAST_SHARE:
        free, total = min(cards)
        raise UserError(
            f"a card has {free} of {total} MiB free: stop what else runs on it (nvidia-smi), or"
            " choose another with CUDA_VISIBLE_DEVICES"
        )
    return ["--gpu-memory-utilization", f"{math.floor(100 * share) / 100}"]


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


def _cpu_environment(
    checkpoint: Checkpoint, max_model_len: int, ranks: Ranks, threads: int | None
) -> dict[str, str]:
    chosen = {
        **WEIGHTS_ONLY,
        CACHE: str(_cache_gib(checkpoint, max_model_len, ranks)),
        "VLLM_CPU_OMP_THREADS_BIND": _binding(ranks.count, threads),
        # Eager mode still compiles the ranking of prompt log-probabilities, for half a minute and
        # with a C++ compiler that a serving machine need not have.
        "TORCH_COMPILE_DISABLE": "1",
    }
    # What the user set in the environment stands, unless an option says otherwise.
    optional = {"VLLM_CPU_OMP_THREADS_BIND"} if threads is not None else set()
    return chosen | {
        name: os.environ[name] for name in chosen.keys() - optional if os.environ.get(name)
    }


def _cache_gib(checkpoint: Checkpoint, max_model_len: int, ranks: Ranks) -> int:
    """Whole GiB for the KV cache of a rank: as the environment says, or SEQUENCES full sequences.

    Unless told, all ranks together take at most half of what is left free.
    """
    dtype = cpu_dtype()
    sequence = kv_bytes_per_token(checkpoint.text_config, dtype) * max_model_len
    # Ranks beyond the key-value heads keep copies of them.
    kv_heads = checkpoint.text_config.get("num_key_value_heads") or ranks.tensor
    share = sequence / min(ranks.tensor, kv_heads)
    if told := os.environ.get(CACHE):
        return _told_gib(told, share, max_model_len)
    weights = _weights_bytes(checkpoint, dtype)
    left = available_memory() - weights
    most = left // 2 // GIB // ranks.count
    if most < 1 or share > most * GIB:
        raise UserError(
            f"{checkpoint.path}: too little free memory: its weights take"
            f" {weights / GIB:.1f} GiB and one sequence of {max_model_len}"
            f" tokens {sequence / GIB:.1f} GiB, {available_memory() / GIB:.1f} GiB are free;"
            f" lower --max-model-len, free memory, or set {CACHE} to take more than half of it"
        )
    return min(most, max(1, math.ceil(SEQUENCES * share / GIB)))


def _told_gib(told: str, share: float, max_model_len: int) -> int:
    """The size that the environment sets, if one sequence fits into it."""
    if not told.isdigit() or int(told) * GIB < share:
        raise UserError(
            f"{CACHE}={told}: give whole GiB, of which one sequence of {max_model_len} tokens takes"
            f" {share / GIB:.1f} on a rank, or lower --max-model-len"
        )
    return int(told)


def _binding(ranks: int, threads: int | None) -> str:
    """Cores as vLLM wants them: `0,1|2,3` for two ranks."""
    cpus = physical_cpus()
    if ranks > len(cpus):
        raise UserError(
            f"--tp: {ranks} ranks want a core each; this process may use {len(cpus)}:"
            f" use --tp {len(cpus)} at most"
        )
    if threads is None:
        few = len(cpus) <= BIND_ALL_UP_TO * ranks
        if ranks == 1 and not few:
            return "auto"
        # For several ranks vLLM's own binding wants a NUMA node for each.
        threads = len(cpus) if few else len(cpus) - ranks
    if not ranks <= threads <= len(cpus):
        raise UserError(
            f"--threads: {threads} is not possible: give {_range(ranks, len(cpus))}"
            " (cores of this process; every rank needs one)"
        )
    each = threads // ranks
    return "|".join(",".join(map(str, cpus[i * each : (i + 1) * each])) for i in range(ranks))


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"
