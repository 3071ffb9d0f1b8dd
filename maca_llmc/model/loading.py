"""Find, check, load and save the model to quantize: the embedded one, a folder, or a hub name."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.quantization.utils import is_module_quantized
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.falcon.modeling_falcon import FalconLinear, FalconPreTrainedModel
from transformers.utils import cached_file

from maca_llmc.common.errors import UserError, first_line
from maca_llmc.common.progress import reading_progress
from maca_llmc.llmcompressor_api import (
    keep_expert_names,
    loading_separate_experts,
    patch_attr,
    separate_experts,
)
from maca_llmc.model import base_weights, smollm2
from maca_llmc.recipe.targets import by_end

READ_AT_ONCE = 2**22
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
"""Where tokenizers of every kind keep their vocabulary."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What weights may be loaded as."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)


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
    base_weights.read_headers(str(folder))


def read_config(source: str) -> Any:
    """The configuration of ``source``, quantized or not.

    :raises UserError: when it cannot be read
    """
    with _readable(source):
        return AutoConfig.from_pretrained(source)


def load_config(source: str) -> Any:
    """The configuration of an unquantized model.

    :raises UserError: when it cannot be read, or it or the weights say that the model is quantized
        already
    """
    config = read_config(source)
    if _is_quantized(config):
        raise UserError(f"model {source} is quantized already: give the unquantized one")
    for part in (config, config.get_text_config()):
        if getattr(part, "dtype", None) not in (None, *DTYPES):
            raise UserError(
                f"model {source} is to be loaded as {part.dtype}: write dtype bfloat16, float16 or "
                "float32 into its config.json, as its weights are"
            )
    base_weights.check_unquantized(source, base_weights.read_headers(source))
    return config


def _is_quantized(config: Any) -> bool:
    parts = (config, config.get_text_config())
    return any(getattr(part, "quantization_config", None) is not None for part in parts)


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

    :raises UserError: when there is none, or a file of it is damaged
    """
    _check_tokenizer(source)
    try:
        with _readable(source):
            tokenizer = AutoTokenizer.from_pretrained(source)
    except UserError as error:
        if damaged := _damaged_json(source):
            raise UserError(f"{damaged} is damaged: download it or make it again") from error
        raise
    _check_tokenizer(source)  # again: a hub model's files were not there before
    return tokenizer


def _check_tokenizer(source: str) -> None:
    """Refuse a folder without a vocabulary: transformers would make one of a few tokens up."""
    folder = base_weights.folder_of(source)
    if folder is not None and not any(any(folder.glob(kind)) for kind in VOCABULARIES):
        raise UserError(
            f"model {source} has no tokenizer (none of {', '.join(VOCABULARIES)}): copy the base's "
            "tokenizer files into it"
        )


def _damaged_json(source: str) -> Path | None:
    folder = base_weights.folder_of(source)
    for path in [] if folder is None else sorted(folder.glob("*token*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return path
    return None


def load_model(source: str, config: Any, dtype: Any = "auto", **extra: Any) -> Any:
    """The model on the CPU, by default in its own dtype, experts as separate Linears.

    llm-compressor moves one layer at a time to the device, so the model may be larger than it.

    :param extra: passed on to ``from_pretrained``
    :raises UserError: when its weights cannot be read, are quantized, or are NaN or infinite; when
        some are not there or of other sizes: transformers would make them up
    """
    model_class = model_class_of(config)
    with (
        _readable(source),
        noting_findings(model_class) as found,
        loading_separate_experts(model_class, config.model_type),
        _initializing_nothing() if _is_quantized(config) else nullcontext(),
    ):
        model = model_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **extra)
    base_weights.refuse_sizes(source, found["mismatched_keys"])
    if not _is_quantized(config):
        if missing := found["missing_keys"]:
            raise UserError(
                f"model {source} lacks {len(missing)} weights of {model_class.__name__}, first "
                f"{min(missing)}: complete it, or mend the architectures of its config.json"
            )
        # again: a hub model's files were not there before
        base_weights.check_unquantized(source, base_weights.read_headers(source))
        base_weights.check_finite(source, model)
    elif dtype != "auto":
        _cast_unquantized(model, dtype)
    keep_expert_names(model)
    return plain_linears(model).eval()


def _cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Have routers of experts in the dtype asked for: of a quantized model they keep their own."""
    for module in model.modules():
        if not is_module_quantized(module):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)


@contextmanager
def _initializing_nothing() -> Iterator[None]:
    """While open, leave out Falcon's initialization, which asks Linears of codes for weights."""
    with patch_attr(FalconPreTrainedModel, "_init_weights", PreTrainedModel._init_weights):
        yield


@contextmanager
def noting_findings(model_class: Any) -> Iterator[dict[str, set[Any]]]:
    """While open, note which weights a model that is loaded has not found, or of other sizes."""
    original = model_class.from_pretrained
    noted: dict[str, set[Any]] = {"missing_keys": set(), "mismatched_keys": set()}

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = original(*args, **options, **kwargs)
        for kind, names in noted.items():
            names.update(found[kind])
        return model

    with patch_attr(model_class, "from_pretrained", from_pretrained):
        yield noted


def save_model(model: Any, folder: Path) -> None:
    """Write a quantized model so that both vLLM and transformers can read it.

    llm-compressor writes what is not quantized under the checkpoint's names, which vLLM reads.
    transformers looks for its own names: where they differ (a vision tower), both are listed. vLLM
    builds some Linears outside the layers elsewhere (Gemma 3n): those are listed by their end.
    What the base model says of generation is passed on as it is: some of it (a temperature beside
    ``do_sample: false``) transformers reads and would not write. Draft layers that are not there
    are no longer promised.
    """
    with patch_attr(GenerationConfig, "validate", lambda *_, **__: None):
        model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    ignored = config["quantization_config"]["ignore"]
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not is_module_quantized(module)
    ]
    ignored += [name for name in plain if name not in ignored]
    ignored += _ends(model, [name for name in plain if not _within_layers(name)])
    if not base_weights.draft_tensors(base_weights.read_headers(str(folder)), model.config):
        base_weights.forget_draft_layers(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _within_layers(name: str) -> bool:
    return bool(re.search(r"\.\d+\.", name) or base_weights.ENCODER.search(name))


def _ends(model: torch.nn.Module, names: list[str]) -> list[str]:
    """Expressions for the ends of modules' names, but of those that would name quantized ones."""
    quantized = [name for name, module in model.named_modules() if is_module_quantized(module)]
    ends = dict.fromkeys(by_end(name) for name in names if "." in name)
    return [end for end in ends if not any(re.match(end[3:], name) for name in quantized)]


def meta_model(config: Any) -> Any:
    """The model without weights: its modules and their shapes.

    :raises UserError: when transformers cannot make one of the configuration
    """
    model_class = model_class_of(config)
    try:
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        with torch.device("meta"):
            return plain_linears(separate_experts(build(config)))
    except UserError:
        raise
    except Exception as error:  # what a wrong number or name leads to is of any type
        raise UserError(
            f"cannot make a {model_class.__name__} of the config.json of {config._name_or_path} "
            f"({type(error).__name__}: {first_line(error)}): mend it, or take the one that came "
            "with the weights"
        ) from error


def plain_linears(model: Any) -> Any:
    """Make plain Linears of those that only spell the product otherwise (Falcon's).

    compressed-tensors would write a subclass as it is, and promise codes.
    """
    for module in model.modules():
        if type(module) is FalconLinear:
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]
    return model


def model_class_of(config: Any) -> Any:
    """The class a checkpoint names, so that a multimodal one keeps all its parts."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModelForCausalLM


def context_length(config: Any) -> int | None:
    """Longest input in tokens, None when the configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def processor_files(source: str) -> list[Path]:
    """What a multimodal model has for its processor; nothing for a text model.

    They are copied: loading them takes packages (torchvision, PyAV) that text has no use for.

    :raises UserError: when the hub cannot be asked for them
    """
    with _readable(source):
        found = [
            cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            for name in PROCESSOR_FILES
        ]
    return [Path(path) for path in found if path is not None]


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        said = f"{first_line(error)}{_hub_hint(source)}"
        raise UserError(f"cannot load model {source}: {said}") from error


def _hub_hint(source: str) -> str:
    if Path(source).is_dir():
        return ""
    return " (a hub name needs the network or a local copy; a gated one `hf auth login`)"
