"""Length-aware calibration for llm-compressor's GPTQ. Importing this registers ``MaCaModifier``."""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("llmcompressor") is not None:
    from maca_llmc.modifier import MaCaModifier

    __all__ = ["MaCaModifier"]
