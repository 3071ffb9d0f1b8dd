"""Serve one checkpoint on this machine."""

from pathlib import Path

from maca_serve.checkpoint import open_checkpoint
from maca_serve.engine import Engine, claim_port
from maca_serve.fit import fit
from maca_serve.machine import require_vllm

HOST = "127.0.0.1"
PORT = 8000


def up(
    path: str | Path,
    *,
    port: int | None = PORT,
    max_model_len: int | None = None,
    host: str = HOST,
) -> Engine:
    """An engine with settings fit for the machine; it starts on entering and stops on leaving.

        with maca_serve.up("runs/demo/maca") as engine:
            print(engine.kernel, engine.url)

    Args:
        path: a checkpoint folder, quantized or not.
        port: TCP port; a free one when None.
        max_model_len: tokens of prompt and output together; fit for the machine when None.
        host: address to listen on; only this machine unless told otherwise.

    Raises:
        UserError: vLLM is missing, not a checkpoint, a length that does not fit, or a port taken.
    """
    version = require_vllm()
    checkpoint = open_checkpoint(Path(path))
    claim_port(host, port)
    return Engine(
        checkpoint, fit(checkpoint, version, max_model_len=max_model_len), host=host, port=port
    )
