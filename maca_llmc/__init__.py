"""Length-aware calibration for llm-compressor's GPTQ.

>>> from llmcompressor import oneshot
>>> from maca_llmc import MaCaModifier
>>> oneshot(model=..., dataset=..., recipe="recipes/w4a16-g128.maca.yaml")

``quantize``, ``tune``, ``plan`` and ``evaluate`` are the commands as Python calls.

``import maca_llmc`` alone does not wait for torch. The first name that is used imports
llm-compressor, and registers ``MaCaModifier`` and the pipeline "maca" there; where llm-compressor
has been imported before, so does the import itself.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from maca_llmc.options import QuantizeOptions

if TYPE_CHECKING:
    from maca_llmc.data import build_calibration_set
    from maca_llmc.evaluation.divergence import evaluate
    from maca_llmc.modifier import MaCaModifier
    from maca_llmc.planning.plans import plan
    from maca_llmc.tuning.after_quantizing import quantize
    from maca_llmc.tuning.run import tune

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

_HOMES = {
    "MaCaModifier": "modifier",
    "build_calibration_set": "data",
    "evaluate": "evaluation.divergence",
    "plan": "planning.plans",
    "quantize": "tuning.after_quantizing",
    "tune": "tuning.run",
}
_REGISTERING = ("maca_llmc.modifier", "maca_llmc.calibrate.pipeline")


def __getattr__(name: str) -> Any:
    """Import on first use: the command's help and our pure modules need not wait for torch.

    :raises ImportError: where llm-compressor is not installed
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("llmcompressor") is None:
        raise ImportError(MISSING)
    _register()
    return getattr(import_module(f"maca_llmc.{_HOMES[name]}"), name)


def _register() -> None:
    for module in _REGISTERING:
        import_module(module)


if "llmcompressor" in sys.modules:
    _register()
