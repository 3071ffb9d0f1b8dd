"""Serve one checkpoint on this machine."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.request import getproxies

from maca_serve.common.errors import UserError
from maca_serve.common.machine import require_vllm
from maca_serve.common.ranks import Ranks, check_ranks
from maca_serve.doctor.checks import require_sound
from maca_serve.doctor.loadable import require_loadable
from maca_serve.engine.engine import Engine, claim_port
from maca_serve.engine.extra_flags import check_flags
from maca_serve.engine.fit import fit
from maca_serve.engine.guard import KEY_VARIABLE
from maca_serve.formats.checkpoint import open_checkpoint

HOST = "127.0.0.1"
PORT = 8000
# With it vLLM would serve by another program, which knows no middleware.
RUST = "VLLM_USE_RUST_FRONTEND"


def up(
    path: str | Path,
    *,
    port: int | None = PORT,
    max_model_len: int | None = None,
    host: str = HOST,
    api_key: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    threads: int | None = None,
    vllm_flags: Sequence[str] = (),
) -> Engine:
    """An engine with settings fit for the machine; it starts on entering and stops on leaving.

        with maca_serve.up("runs/demo/maca") as engine:
            print(engine.kernel, engine.url)

    Args:
        path: a checkpoint folder, quantized or not.
        port: TCP port; a free one when None.
        max_model_len: tokens of prompt and output together; fit for the machine when None.
        host: address to listen on; only this machine unless told otherwise.
        api_key: what clients must show on every path but `/health`; VLLM_API_KEY of the
            environment when None.
        tensor_parallel: ranks that share every layer.
        pipeline_parallel: ranks that share the stack of layers.
        threads: CPU cores to compute on, divided among the ranks; None: see `engine.fit`.
        vllm_flags: further flags for `vllm serve`.

    Raises:
        UserError: vLLM is missing, not a sound checkpoint, a length or ranks that do not fit, a
            flag that has an argument here, or a port taken.
    """
    version = require_vllm()
    flags = check_flags(vllm_flags)
    ranks = Ranks(tensor_parallel, pipeline_parallel)
    checkpoint = open_checkpoint(Path(path))
    require_sound(checkpoint.path, checkpoint.config)
    claim_port(host, port)
    require_loadable([checkpoint])
    check_ranks(checkpoint, ranks)
    chosen = fit(checkpoint, version, max_model_len=max_model_len, ranks=ranks, threads=threads)
    chosen.arguments.extend(flags)
    return Engine(checkpoint, chosen, host=host, port=port, api_key=_key(api_key))


def usual_port(host: str) -> int:
    """8000, or a free port where that is taken."""
    try:
        return claim_port(host, PORT)
    except UserError:
        return claim_port(host, None)


def describe(engine: Engine) -> list[str]:
    """What a running engine is, where, and how to try it; lines for people."""
    body = {"model": engine.checkpoint.name, "prompt": "The capital of France is"}
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if engine.api_key else ""
    direct = " --noproxy '*'" if {"http", "all"} & getproxies().keys() else ""
    return [
        f"{engine.checkpoint.name}: {engine.checkpoint.scheme}",
        f"kernel: {engine.kernel}",
        f"fit:    {engine.fit.words}",
        f"url:    {engine.url}/v1",
        f"log:    {engine.log}",
        f"try:    curl{direct} {engine.url}/v1/completions -H 'Content-Type: application/json'{key}"
        f" -d '{json.dumps(body)}'",
        "Ctrl-C stops it.",
    ]


def _key(given: str | None) -> str | None:
    key = given if given is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
        raise UserError(f"--api-key, {KEY_VARIABLE}: give ASCII characters without spaces")
    if key is not None and os.environ.get(RUST, "0") != "0":
        raise UserError(
            f"{RUST}: vLLM's Rust server asks for a key on some paths only: unset {RUST}, or"
            f" {KEY_VARIABLE} where everybody may use it"
        )
    return key
