"""vLLM's fused mixture-of-experts layers: what a checkpoint has for them, and one of them built.

How a model builds them (routing, activation, names of the projections) stands in its code only, as
the arguments with which a block of it calls vLLM's `FusedMoEFactory`. So the block is built on the
meta device up to that call, and the call is made again with the checkpoint's quantization.
"""

import inspect
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import nn

from maca_serve.doctor.building import ROOMY
from maca_serve.doctor.fusing import modules_of, renamer

FACTORY = "FusedMoEFactory"
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)")
Call = dict[str, Any]


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, as the checkpoint has them.

    Attributes:
        name: of vLLM's layer, for instance `model.layers.0.mlp.experts`.
        parts: names of the checkpoint's modules.
        count: how many experts there are.
        sizes: (output features, input features) by the last part of the name, for all experts.
    """

    name: str
    parts: tuple[str, ...]
    count: int
    sizes: dict[str, tuple[int, int]]


def is_expert(module: str) -> bool:
    """Whether a module is part of an expert, by the checkpoint's name or vLLM's."""
    return ".experts." in module


def gather(model: Any, sizes: dict[str, tuple[int, int]]) -> list[Experts]:
    """The layers of experts among modules of experts.

    Args:
        model: vLLM's class for the model.
        sizes: (output features, input features) of the modules by the checkpoint's names.

    Raises:
        LookupError: a layout that is not known here.
    """
    rename = renamer(model)
    layers: dict[str, dict[str, re.Match[str]]] = {}
    for module in sizes:
        match = _EXPERT.fullmatch(rename(module))
        if match is None:
            raise LookupError(f"{module} is no <block>.experts.<number>.<projection>")
        layers.setdefault(match["layer"], {})[module] = match
    return [_layer(name, modules, sizes) for name, modules in layers.items()]


def _layer(
    name: str, modules: dict[str, re.Match[str]], sizes: dict[str, tuple[int, int]]
) -> Experts:
    alike: dict[str, set[tuple[int, int]]] = {}
    for module, match in modules.items():
        alike.setdefault(match["part"], set()).add(sizes[module])
    count = len({match["number"] for match in modules.values()})
    if any(len(found) > 1 for found in alike.values()) or len(modules) != count * len(alike):
        raise LookupError(f"the experts of {name} are not alike")
    common = {part: found.pop() for part, found in alike.items()}
    return Experts(name, tuple(modules), count, common)


def read_call(model: Any, experts: Experts, engine: Any) -> Call:
    """The arguments with which the model's code calls vLLM's factory for a layer.

    To be called as a rank of the tensor-parallel group, on the meta device.

    Args:
        model: vLLM's class for the model.
        experts: of one layer.
        engine: a `VllmConfig` whose model config has vLLM's config object of the model.

    Raises:
        LookupError: the model's code is not one that can be read in this way, or its config and
            the checkpoint's tensors disagree.
        Exception: whatever vLLM raises while it builds the block.
    """
    block = _block(model)
    arguments = _arguments(block, experts, engine)
    call: Call = {}

    class CallReached(BaseException):
        """Nothing of the block is wanted after the call."""

    def note(*positional: Any, **keywords: Any) -> None:
        bound = inspect.signature(factory).bind(*positional, **keywords)
        bound.apply_defaults()
        call.update(bound.arguments)
        raise CallReached

    code = sys.modules[block.__module__]
    factory = getattr(code, FACTORY)
    with patch.object(code, FACTORY, note), suppress(CallReached):
        block(**arguments)
    _compare(call, experts, block)
    return call


def _block(model: Any) -> Any:
    """The one class that builds experts, of the first module that has any."""
    for module in modules_of(model):
        if FACTORY not in vars(module):
            continue
        classes = [value for value in vars(module).values() if _is_block(value, module.__name__)]
        if len(classes) == 1:
            return classes[0]
        raise LookupError(f"{module.__name__} has {len(classes)} classes that build experts")
    raise LookupError("the model's code does not call vLLM's factory of experts")


def _is_block(value: Any, module: str) -> bool:
    if not inspect.isclass(value) or value.__module__ != module:
        return False
    try:
        return f"{FACTORY}(" in inspect.getsource(value)
    except OSError:  # a class that was made without a class statement
        return False


def _arguments(block: Any, experts: Experts, engine: Any) -> Call:
    """What the block's constructor wants, by the names that vLLM's models give it."""
    config = engine.model_config.hf_text_config
    out, width = next(iter(experts.sizes.values()))
    known = {
        "vllm_config": engine,
        "parallel_config": engine.parallel_config,
        "config": config,
        "quant_config": None,
        "prefix": experts.name.rpartition(".")[0],
        "num_experts": experts.count,
        "top_k": getattr(config, "num_experts_per_tok", None),
        "hidden_size": config.hidden_size,
        "intermediate_size": out if width == config.hidden_size else width,
    }
    wanted = inspect.signature(block).parameters
    missing = [n for n, p in wanted.items() if p.default is p.empty and n not in known]
    if missing:
        raise LookupError(f"{block.__name__} wants {', '.join(missing)}, which is not known here")
    return {name: known[name] for name in wanted if name in known}


def _compare(call: Call, experts: Experts, block: Any) -> None:
    if not call or call["prefix"] != experts.name:
        raise LookupError(f"{block.__name__} builds no experts that are called {experts.name}")
    hidden, between = call["hidden_size"], call["intermediate_size"]
    gate, down, up = call["ckpt_names"]
    sizes = {part: (between, hidden) for part in (gate, up) if part}
    sizes[down] = (hidden, between)
    if (sizes, call["num_experts"]) != (experts.sizes, experts.count):
        said = f"{call['num_experts']} experts of {_shown(sizes)}"
        found = f"{experts.count} of {_shown(experts.sizes)}"
        raise LookupError(f"the model's code and config say {said}, the checkpoint has {found}")


def _shown(sizes: dict[str, tuple[int, int]]) -> str:
    parts = sorted(sizes.items())
    return ", ".join(f"{part} {out} x {width}" for part, (out, width) in parts)


class FusedExperts:
    """One layer of experts to ask vLLM about, see `maca_serve.doctor.building.Subject`."""

    def __init__(self, experts: Experts, model: Any, engine: Any, ranks: int) -> None:
        """Read how the model's code builds it, as `read_call`.

        Args:
            experts: of the layer.
            model: as `read_call`.
            engine: as `read_call`.
            ranks: size of the tensor-parallel group.
        """
        self.experts, self.ranks = experts, ranks
        self.call = read_call(model, experts, engine)

    def build(self, quantization: Any) -> Any:
        """See `Subject`."""
        return _build(self.call, quantization)

    def build_roomy(self, quantization: Any) -> Any:
        """See `Subject`."""
        return _build(self.call | {"hidden_size": ROOMY, "intermediate_size": ROOMY}, quantization)

    def describe(self, built: Any) -> dict[str, Any]:
        """See `Subject`; sizes are those of gate and up of one expert, `down` has those of down."""
        hidden, between = self.call["hidden_size"], self.call["intermediate_size"]
        share = between // self.ranks
        outs = [share] * (len(self.experts.sizes) - 1)
        return {
            "layer": self.experts.name,
            "class": "RoutedExperts" if built is None else type(built).__name__,
            "parts": list(self.experts.parts),
            "experts": self.experts.count,
            "backend": _backend_of(built),
            "outs": outs,
            "shape": [between * len(outs), hidden],
            "partition": [sum(outs), hidden],
            "down": {"outs": [hidden], "shape": [hidden, between], "partition": [hidden, share]},
        }


def _backend_of(built: Any) -> str | None:
    """vLLM's name of the backend that it took, which is what its log says."""
    found = vars(getattr(built, "quant_method", SimpleNamespace())).values()
    backends = (value for value in found if isinstance(value, Enum))
    return next((b.value for b in backends if type(b).__name__.endswith("Backend")), None)


def _build(call: Call, quantization: Any) -> Any:
    from vllm.model_executor.layers.fused_moe import layer

    # What runs beside the experts (router, shared experts) has layers of its own.
    plain = {name: value for name, value in call.items() if not isinstance(value, nn.Module)}
    plain |= {"quant_config": quantization, "runner_cls": SimpleNamespace, "runner_args": None}
    built = getattr(layer, FACTORY)(**plain).routed_experts
    if getattr(built.quant_method, "experts_cls", built) is None:
        raise NotImplementedError("none of vLLM's experts classes supports this")
    return built
