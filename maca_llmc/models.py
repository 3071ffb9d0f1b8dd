"""Find, check, load and save the model to quantize: the embedded one, a folder, or a hub name."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.quantization.utils import is_module_quantized
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from maca_llmc import smollm2
from maca_llmc.errors import UserError
from maca_llmc.llmcompressor_api import loading_separate_experts, patch_attr, separate_experts
from maca_llmc.progress import reading_progress

READ_AT_ONCE = 2**22
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def resolve_model(model: str) -> str:
    """The folder or hub name to load: the embedded model's name becomes its folder.

    :raises UserError: for a folder that is missing or has no safetensors weights
    """
    if model == smollm2.NAME:
        return str(smollm2.embedded_model())
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    raise UserError(
        f"model folder {model} does not exist: give a folder, a hub name (org/name) or "
        f"{smollm2.NAME!r}"
    )


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model.

    :raises UserError: when it has no configuration or no safetensors weights, or a file of them is
        not as long as its header says
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json: is it a Hugging Face model?")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(
            f"model folder {folder} has no safetensors weights: save the model with "
            "`save_pretrained` (pickled weights are not read)"
        )
    for path in sorted(folder.glob("*.safetensors")):
        _check_header(path)


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is cut short or damaged ({error}): download it or make it again"
        ) from None


def read_config(source: str) -> Any:
    """The configuration of ``source``, quantized or not.

    :raises UserError: when it cannot be read
    """
    with _readable(source):
        return AutoConfig.from_pretrained(source)


def load_config(source: str) -> Any:
    """The configuration of an unquantized model.

    :raises UserError: when it cannot be read, or says that the model is quantized already
    """
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {source} is quantized already: give the unquantized one")
    return config


def weights_identity(source: str, config: Any) -> str:
    """What tells these weights from any others: a hub revision, or a hash of a folder's files.

    :raises UserError: when the hub did not say which revision it gave
    """
    folder = Path(source)
    if not folder.is_dir():
        if not config._commit_hash:
            raise UserError(f"the revision of {source} is not known: download it, give its folder")
        return f"revision {config._commit_hash}"
    digest = hashlib.sha256()
    paths = sorted(folder.glob("*.safetensors"))
    with reading_progress("reading the weights", paths) as advance:
        for path in paths:
            digest.update(path.name.encode() + _file_digest(path, advance))
    return digest.hexdigest()


def _file_digest(path: Path, advance: Callable[[int], Any]) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_AT_ONCE):
            digest.update(chunk)
            advance(len(chunk))
    return digest.digest()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of ``source``.

    :raises UserError: when there is none
    """
    with _readable(source):
        return AutoTokenizer.from_pretrained(source)


def load_model(source: str, config: Any, dtype: Any = "auto", **extra: Any) -> Any:
    """The model on the CPU, by default in its own dtype, experts as separate Linears.

    llm-compressor moves one layer at a time to the device, so the model may be larger than it.

    :param extra: passed on to ``from_pretrained``
    :raises UserError: when its weights cannot be read, or some are not there: transformers would
        make them up
    """
    model_class = model_class_of(config)
    with (
        _readable(source),
        noting_missing(model_class) as missing,
        loading_separate_experts(model_class, config.model_type),
    ):
        model = model_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **extra)
    if missing and getattr(config, "quantization_config", None) is None:
        raise UserError(
            f"model {source} lacks {len(missing)} weights of {model_class.__name__}, first "
            f"{min(missing)}: complete it, or mend the architectures of its config.json"
        )
    return model.eval()


@contextmanager
def noting_missing(model_class: Any) -> Iterator[set[str]]:
    """While open, note which weights a model that is loaded has not found."""
    original = model_class.from_pretrained
    missing: set[str] = set()

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        model, found = original(*args, output_loading_info=True, **kwargs)
        missing.update(found["missing_keys"])
        return model

    with patch_attr(model_class, "from_pretrained", from_pretrained):
        yield missing


def save_model(model: Any, folder: Path) -> None:
    """Write a quantized model so that both vLLM and transformers can read it.

    llm-compressor writes what is not quantized under the checkpoint's names, which vLLM reads.
    transformers looks for its own names: where they differ (a vision tower), both are listed.
    What the base model says of generation is passed on as it is: some of it (a temperature beside
    ``do_sample: false``) transformers reads and would not write.
    """
    with patch_attr(GenerationConfig, "validate", lambda *_, **__: None):
        model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    ignored = config["quantization_config"]["ignore"]
    ignored += [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not is_module_quantized(module)
        and name not in ignored
    ]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def meta_model(config: Any) -> Any:
    """The model without weights: its modules and their shapes."""
    model_class = model_class_of(config)
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        return separate_experts(build(config))


def model_class_of(config: Any) -> Any:
    """The class a checkpoint names, so that a multimodal one keeps all its parts."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModelForCausalLM


def context_length(config: Any) -> int | None:
    """Longest input in tokens, None when the configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_processor(source: str, tokenizer: Any) -> Any:
    """The processor of a multimodal model; ``tokenizer`` for a model that has none.

    :raises UserError: when it needs a package that is not installed
    """
    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError):  # no preprocessor files: a text model, or one stripped of them
        return tokenizer
    except ImportError as error:
        raise UserError(
            f"the processor of {source} cannot be loaded: {' '.join(str(error).split())}"
        ) from error


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load model {source}: {reason}{_hub_hint(source)}") from error


def _hub_hint(source: str) -> str:
    if Path(source).is_dir():
        return ""
    return " (a hub name needs the network or a local copy; a gated one `hf auth login`)"
