"""A checkpoint's tensors given to vLLM's own model and loader, without memory for either.

The model is built on the meta device, and is given tensors of the checkpoint's names, types and
shapes, which are on the meta device, too. What vLLM's loader refuses, it refuses here. A parameter
that is written in part, or not at all, would be served as memory happens to be: vLLM looks for such
only in models that are not quantized, and does not see a `v_proj` that a `qkv_proj` lacks.
"""

import itertools
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maca_serve.common.errors import one_line
from maca_serve.doctor.building import on_ranks
from maca_serve.doctor.experts_trace import accepting_experts
from maca_serve.doctor.fusing import renamer
from maca_serve.doctor.hf_config import write_config
from maca_serve.doctor.trace import accepting

Answer = dict[str, Any]
# {name: [safetensors' name of the type, shape]}
Described = dict[str, tuple[str, list[int]]]
# Refusals of one look are one finding; of so many looks each is found by loading once more.
LOOKS = 8
_NUMBER = re.compile(r"\b\d+\b")
# A loader that looks at values cannot be asked with tensors that have none.
_NO_VALUES = re.compile(r"\bmeta (tensor|device)")
EXPERTS = ".experts."
# What vLLM puts before the names of experts' tensors.
_OF_EXPERTS = re.compile(r"^w(13|2)_")
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Codes of weights, in whichever type: the loader wants their shape.
_OTHER = torch.uint8


def try_loading(config: dict[str, Any], tensors: Described, *, whole: bool = True) -> Answer:
    """Build vLLM's model of a config and let it load tensors that have no values.

    Args:
        config: the content of a config.json.
        tensors: what the checkpoint has.
        whole: whether these are all of its tensors, so that what is missing is a fault.

    Returns:
        `unasked`, why vLLM's model cannot be built here, else null; `refused`,
        [{"reason", "tensors"}] that the loader would not take; `missing`, names of tensors that the
        model needs; `unread`, names of tensors that it leaves out; `cut`, [{"tensor", "shape",
        "read"}] of which it would read so many numbers;
        `attention`, why vLLM's attention would not run it on this machine, else null.
    """
    found = _try(config, tensors, whole, nullcontext)
    if found["unasked"]:
        # No kernel fits here, which is another question: a layer's tensors are the same for all.
        accepted = _try(config, tensors, whole, _any_kernel)
        return found if accepted["unasked"] else accepted
    return found


def _try(config: dict[str, Any], tensors: Described, whole: bool, kernels: Any) -> Answer:
    found: Answer = {"unasked": None, "attention": None}
    found |= {"refused": [], "missing": [], "unread": [], "cut": []}
    try:
        with kernels(), _model(config, found) as model:
            _load(model, tensors, found, whole)
    except Exception as error:  # whatever vLLM raises while it builds a model
        found["unasked"] = one_line(error)
    return found


@contextmanager
def _any_kernel() -> Iterator[None]:
    with accepting(), accepting_experts():
        yield


@contextmanager
def _model(config: dict[str, Any], found: Answer) -> Iterator[Any]:
    """vLLM's model on the meta device, as the only rank of a group that does not exist."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.model_loader.utils import initialize_model

    with ExitStack() as stack:
        # Some models read the folder again while they are built (Llama 4).
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_config(config, Path(folder))
        model_config = ModelConfig(
            model=folder, tokenizer=folder, skip_tokenizer_init=True, enforce_eager=True
        )
        engine = VllmConfig(model_config=model_config)
        stack.enter_context(_any_attention(found))
        stack.enter_context(on_ranks(engine, 1, model_config.dtype))
        yield initialize_model(engine, model_config=model_config)


@contextmanager
def _any_attention(found: Answer) -> Iterator[None]:
    """Note why vLLM would find no attention here, and build the model with the plain one."""
    from vllm.model_executor.layers.attention import attention

    choose = attention.get_attn_backend

    def note(head_size: int, dtype: torch.dtype, cache: Any, **keywords: Any) -> Any:
        try:
            return choose(head_size, dtype, cache, **keywords)
        except Exception as error:  # as the engine would
            found["attention"] = one_line(error)
            return choose(64, dtype, "auto")

    with patch.object(attention, "get_attn_backend", note):
        yield


def _load(model: Any, tensors: Described, found: Answer, whole: bool) -> None:
    left = dict(tensors)
    writes = _Writes()
    for _ in range(LOOKS):
        writes = _Writes()
        given = _Given(left, writes)
        try:
            with writes:
                model.load_weights(iter(given))
            break
        except Exception as error:  # whatever the loader raises is the reason
            if _NO_VALUES.search(str(error)):
                raise
            look = _NUMBER.sub("*", given.last)
            alike = [name for name in left if _NUMBER.sub("*", name) == look]
            alike.sort(key=lambda name: name != given.last)  # the culprit first
            found["refused"].append({"reason": one_line(error), "tensors": alike})
            for name in alike:
                del left[name]
    else:  # so much is refused that nobody knows what would be read of the rest
        return
    if not whole:
        return
    refused = {name for each in found["refused"] for name in each["tensors"]}
    missing = _missing(model, set(tensors), refused, writes)
    found["missing"] = sorted(missing - refused)
    found["unread"] = sorted(set(given.unread()) - refused)
    found["cut"] = [
        {"tensor": name, "shape": list(tensor.shape), "read": read}
        for name, tensor, read in given.parts_read()
    ]


class _Given:
    """Tensors without values, one after another; it remembers them, and which came last."""

    def __init__(self, tensors: Described, writes: "_Writes") -> None:
        self.tensors, self.writes, self.last = tensors, writes, ""
        self.made: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape) in self.tensors.items():
            self.last = name
            self.made[name] = _make(dtype, shape)
            self.writes.forget(self.made[name])
            yield name, self.made[name]

    def unread(self) -> Iterator[str]:
        """Names of tensors that nothing was done with."""
        for name, tensor in self.made.items():
            if tensor.untyped_storage()._cdata not in self.writes.used:
                yield name

    def parts_read(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Tensors that were read once, and not all of them."""
        for name, tensor in self.made.items():
            read = self.writes.read.get(tensor.untyped_storage()._cdata, 0)
            if 0 < read < tensor.numel():
                yield name, tensor, read


def _make(dtype: str, shape: list[int]) -> torch.Tensor:
    kind = _DTYPES.get(dtype, _OTHER)
    # Loaders look at single numbers.
    if math.prod(shape) == 1:
        return torch.ones(shape, dtype=kind, device="cpu")
    return torch.empty(shape, dtype=kind, device="meta")


class _Writes(TorchDispatchMode):
    """Counts the elements that are written to, and read from, each storage.

    Attributes:
        used: storages that any operation was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()
        self.written: dict[int, int] = defaultdict(int)
        self.read: dict[int, int] = defaultdict(int)

    def forget(self, tensor: torch.Tensor) -> None:
        """Count a new tensor from nothing: its storage may lie where another's was."""
        place = tensor.untyped_storage()._cdata
        self.used.discard(place)
        self.read.pop(place, None)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        self.used.update(tensor.untyped_storage()._cdata for tensor in tensors)
        if function._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            self.written[args[0].untyped_storage()._cdata] += args[0].numel()
            if function is torch.ops.aten.copy_.default:
                self.read[args[1].untyped_storage()._cdata] += args[1].numel()
                if args[1].is_meta and not args[0].is_meta:
                    # A model may name the device of a parameter; there are no values to copy.
                    args[1].expand_as(args[0])
                    return args[0]
        return function(*args, **(kwargs or {}))


def _missing(model: Any, present: set[str], refused: set[str], writes: _Writes) -> set[str]:
    """Names of tensors without which a parameter is not all written, those refused among them."""
    exempt = _exempt(model)
    unwritten = {}
    for name, parameter in model.named_parameters():
        written = writes.written.get(parameter.untyped_storage()._cdata, 0)
        if written < parameter.numel() and name not in exempt:
            unwritten[name] = written
    if not unwritten:
        return set()
    names = Names(model, present, refused)
    missing: set[str] = set()
    for name, written in unwritten.items():
        lacking = names.lacking(name)
        # What is written in part, and lacks nothing, has padding.
        missing |= lacking or (set() if written else {name})
    return missing


def _exempt(model: Any) -> set[str]:
    """Parameters that no checkpoint has to have, as vLLM says, but scales of a static cache."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    exempt: set[str] = set()
    with suppress(ValueError):  # it raises over the rest; what is exempt is in the set by then
        DefaultModelLoader.track_weights_loading(None, model, exempt, quantized=True)
    for name, module in model.named_modules():
        quantization = getattr(getattr(module, "quant_method", None), "quant_config", None)
        cache = getattr(quantization, "kv_cache_scheme", None)
        if cache and not cache.get("dynamic"):
            exempt -= {f"{name}.k_scale", f"{name}.v_scale"}
    return exempt


class Names:
    """The checkpoint's names of what a parameter of vLLM's is made of."""

    def __init__(self, model: Any, present: set[str], refused: set[str]) -> None:
        """Guess the names that a whole checkpoint would have besides.

        Args:
            model: vLLM's, with parameters.
            present: names of the checkpoint's tensors.
            refused: those that the loader would not take.
        """
        self.rename = renamer(type(model))
        self.parts = getattr(model, "packed_modules_mapping", None) or {}
        absent = (_completed(present) - present) | refused
        self.present = {self.rename(name) for name in present - refused}
        self.absent = {self.rename(name): name for name in absent}

    def lacking(self, parameter: str) -> set[str]:
        """Tensors that it would be made of and that are not there.

        Args:
            parameter: vLLM's name.
        """
        module, _, suffix = parameter.rpartition(".")
        parent, _, last = module.rpartition(".")
        if EXPERTS in parameter:
            block = parameter.partition(EXPERTS)[0] + EXPERTS
            kind = _OF_EXPERTS.sub("", suffix)
            wanted = {n for n in self.absent if n.startswith(block) and n.endswith(f".{kind}")}
        elif last == "attn" and suffix in ("k_scale", "v_scale"):
            wanted = {f"{parent}.{suffix}"}
        else:
            before = f"{parent}." if parent else ""
            wanted = {f"{before}{part}.{suffix}" for part in self.parts.get(last, [last])}
        return {self.absent.get(name, name) for name in wanted - self.present}


def _completed(present: set[str]) -> set[str]:
    """Names with every number that others of the same look have in its place.

    Of two layers with three and four experts, both would have four.
    """
    looks: dict[str, list[set[str]]] = {}
    for name in present:
        numbers = _NUMBER.findall(name)
        seen = looks.setdefault(_NUMBER.sub("{}", name), [set() for _ in numbers])
        for number, all_of_them in zip(numbers, seen, strict=True):
            all_of_them.add(number)
    return {look.format(*each) for look, seen in looks.items() for each in itertools.product(*seen)}
