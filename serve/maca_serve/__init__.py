"""Serve compressed-tensors checkpoints with vLLM, and measure what came out.

Each command of `maca-serve` is a function here, with the same defaults:

    import maca_serve

    with maca_serve.up("runs/demo/maca") as engine:       # maca-serve up
        print(engine.kernel, engine.url)
    maca_serve.accuracy(["base", "runs/demo/maca"])        # maca-serve accuracy
    maca_serve.throughput(["base", "runs/demo/maca"])      # maca-serve throughput
    maca_serve.compare("base", ["runs/demo/maca"])         # maca-serve compare
    maca_serve.diagnose("runs/demo/maca", gpu="90")        # maca-serve doctor
    maca_serve.repack("w3", "w3-in-4")                     # maca-serve repack
    maca_serve.verify("runs/demo/maca")                    # maca-serve verify
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maca_serve.common.errors import EngineError, IncompleteError, RequestError, UserError

if TYPE_CHECKING:
    from maca_serve.doctor import diagnose
    from maca_serve.engine.launch import up
    from maca_serve.formats.repacking import repack
    from maca_serve.measuring.comparison import compare
    from maca_serve.measuring.measure import accuracy, throughput
    from maca_serve.verification import verify

__version__ = "0.1.0"
__all__ = [
    "EngineError",
    "IncompleteError",
    "RequestError",
    "UserError",
    "accuracy",
    "compare",
    "diagnose",
    "repack",
    "throughput",
    "up",
    "verify",
]

# Imported on first use: `maca-serve --help` must not wait for matplotlib and transformers.
_HOMES = {
    "accuracy": "maca_serve.measuring.measure",
    "compare": "maca_serve.measuring.comparison",
    "diagnose": "maca_serve.doctor",
    "repack": "maca_serve.formats.repacking",
    "throughput": "maca_serve.measuring.measure",
    "up": "maca_serve.engine.launch",
    "verify": "maca_serve.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'maca_serve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
