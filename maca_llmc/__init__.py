"""Length-aware calibration for llm-compressor's GPTQ. Importing this registers ``MaCaModifier``.

>>> import maca_llmc
>>> from llmcompressor import oneshot
>>> oneshot(model=..., dataset=..., recipe="recipes/w4a16-g128.maca.yaml")

``quantize``, ``tune``, ``plan`` and ``evaluate`` are the commands as Python calls.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "MaCaModifier",
    "QuantizeOptions",
    "build_calibration_set",
    "evaluate",
    "plan",
    "quantize",
    "tune",
]

MISSING = (
    "maca-llmc needs llmcompressor==0.14.0.1, which is not installed here (it and vLLM need "
    "environments of their own): run `make setup` in the checkout and use its .venv"
)

AS_COMMAND = Path(sys.argv[0]).name == "maca-llmc"

if AS_COMMAND:
    # llm-compressor logs to standard output as soon as it is imported; the command shows its
    # warnings itself, once each. In anyone else's program its logging is left alone.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

if find_spec("llmcompressor") is not None and not AS_COMMAND:
    from maca_llmc.data import build_calibration_set
    from maca_llmc.evaluation.divergence import evaluate
    from maca_llmc.gptq import cpu_backend  # noqa: F401  # registers the compiled sweep
    from maca_llmc.modifier import MaCaModifier
    from maca_llmc.options import QuantizeOptions
    from maca_llmc.planning.plans import plan
    from maca_llmc.tuning.after_quantizing import quantize
    from maca_llmc.tuning.run import tune

else:
    HOMES = {
        "MaCaModifier": "modifier",
        "QuantizeOptions": "options",
        "build_calibration_set": "data",
        "evaluate": "evaluation.divergence",
        "plan": "planning.plans",
        "quantize": "tuning.after_quantizing",
        "tune": "tuning.run",
    }

    def __getattr__(name: str) -> Any:
        """Import on first use: the command's help and its usage errors need not wait for torch."""
        if name not in HOMES:
            raise AttributeError(name)  # also for submodules, which are looked up here first
        if find_spec("llmcompressor") is None:
            raise ImportError(MISSING)
        import_module("maca_llmc.gptq.cpu_backend")
        return getattr(import_module(f"maca_llmc.{HOMES[name]}"), name)
