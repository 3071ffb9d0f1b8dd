"""What an engine holds in memory, and how many bytes of weights it reads for a token."""

import re
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.doctor.headers import read_headers
from maca_serve.engine.enginelog import find_cache, find_weights_memory
from maca_serve.formats.checkpoint import Checkpoint

Entry = dict[str, Any]
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_OTHER_TOWERS = ("vision_config", "audio_config")


def memory(checkpoint: Checkpoint, lines: list[str], ranks: int = 1) -> Entry:
    """Memory of weights and KV cache, as the engine's log says; else the weights' from the files.

    Args:
        checkpoint: what runs.
        lines: of the engine's log.
        ranks: of the engine; each takes what the log says of one.

    Returns:
        {"weights_bytes", "weights_source", "kv_cache_bytes", "kv_cache_tokens"}; the last two are
        None where the log does not say.
    """
    logged = find_weights_memory(lines)
    cache, tokens = find_cache(lines)
    return {
        "weights_bytes": checkpoint.size_bytes if logged is None else ranks * logged,
        "weights_source": "files" if logged is None else "vLLM's log",
        "kv_cache_bytes": None if cache is None else ranks * cache,
        "kv_cache_tokens": tokens,
    }


def bandwidth_share(
    checkpoint: Checkpoint, throughput: Entry, copied: float, dtype: str = "bfloat16"
) -> Entry:
    """The share of a copy bandwidth that decoding at one request in flight reaches.

    Bytes of weights per token / median TPOT / copy bandwidth, at the shortest prompts, where the KV
    cache, which is not counted, is small. It may exceed 1: a copy writes as much as it reads.

    Args:
        checkpoint: what ran.
        throughput: its runs by prompt length and requests in flight.
        copied: bytes read and written per second.
        dtype: what the engine computed in.

    Returns:
        {"weights_bytes_per_token", "bytes_per_s", "share"}, or {"not_computed": why}.
    """
    runs = throughput[min(throughput, key=int)]
    if "1" not in runs:
        return {"not_computed": "nothing ran with 1 request in flight"}
    try:
        weights = bytes_per_token(checkpoint, dtype)
    except UserError as error:
        return {"not_computed": str(error)}
    speed = weights * 1000.0 / runs["1"]["tpot_ms"]["median"]
    return {"weights_bytes_per_token": weights, "bytes_per_s": speed, "share": speed / copied}


def bytes_per_token(checkpoint: Checkpoint, dtype: str = "bfloat16") -> int:
    """Bytes of weights that decoding one token reads, in an engine that computes in `dtype`.

    Everything but the input embedding, of which one row is read; where no head is stored, the
    embedding is the head, and counts. Weights that are no codes count in `dtype`.

    Raises:
        UserError: experts of which only some are read, more than a language model, tensors whose
            embedding is not known, or no readable safetensors.
    """
    config = checkpoint.text_config
    if any((config.get(key) or 0) > 1 for key in _EXPERTS):
        raise UserError("not all experts are read for a token")
    if any(key in checkpoint.config for key in _OTHER_TOWERS):
        raise UserError("the files hold more than a language model")
    tensors = list(read_headers(checkpoint.path).values())
    embeddings = [tensor for tensor in tensors if tensor.name.endswith(_EMBEDDINGS)]
    if not embeddings:
        raise UserError("none of the tensors is known as the input embedding")
    rest = [tensor for tensor in tensors if tensor not in embeddings]
    if not any(_HEAD.search(tensor.name) for tensor in rest):
        rest.append(embeddings[0])
    return sum(tensor.loaded_bytes(dtype) for tensor in rest)
