"""The layers that vLLM's model makes of a checkpoint's modules.

Which modules are fused is what the model class says (`packed_modules_mapping`), and what its
constructor adds to that for a config with such modules. How tensor parallelism splits a layer is
not written down anywhere but in the model's code, as the class that it builds under a name
(`RowParallelLinear(..., prefix=f"{prefix}.o_proj")`), so it is read there.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

_NONE = "has no model class of its own for"
MODELS = "vllm.model_executor.models."
LINEARS = (
    "QKVParallelLinear",
    "MergedColumnParallelLinear",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "ReplicatedLinear",
    "ParallelLMHead",
)


@dataclass(frozen=True)
class Layer:
    """One of vLLM's layers.

    Attributes:
        name: its name in vLLM.
        kind: the class that vLLM's model builds, None when its code does not say.
        parts: names of the checkpoint's modules it is made of, in order.
        outs: output features of each part.
        width: input features.
    """

    name: str
    kind: str | None
    parts: tuple[str, ...]
    outs: tuple[int, ...]
    width: int


def model_class(architectures: list[str]) -> Any:
    """vLLM's class for a model.

    Raises:
        LookupError: vLLM has none of its own for these names.
        Exception: it cannot be imported here, for want of a package.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    for name in architectures:
        if name in ModelRegistry.models:
            return ModelRegistry.models[name].load_model_cls()
    names = ", ".join(architectures)
    raise LookupError(f"vLLM {_NONE} {names}: it may run through its Transformers backend")


def adopt_fusions(model: Any, modules: Iterable[str]) -> None:
    """Add to the class what its constructor would, in the dictionary that it would write to.

    Qwen3-MoE, for one, fuses gate and up only in a config with dense layers. Its condition is not
    evaluated: an entry counts where the checkpoint has all its parts beside each other.

    Args:
        model: vLLM's class for the model.
        modules: names of the checkpoint's modules without those of experts.
    """
    rename = renamer(model)
    siblings: dict[str, set[str]] = {}
    for module in modules:
        parent, _, last = rename(module).rpartition(".")
        siblings.setdefault(parent, set()).add(last)
    for whole, parts in _added(model):
        if any(last.issuperset(parts) for last in siblings.values()):
            model.packed_modules_mapping[whole] = parts


def _added(model: Any) -> Iterator[tuple[str, list[str]]]:
    """(fused name, parts) of `self.packed_modules_mapping["..."] = [...]` in a class's code."""
    for base in model.__mro__:
        if not base.__module__.startswith(MODELS):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            match node:
                case ast.Assign(
                    targets=[
                        ast.Subscript(
                            value=ast.Attribute(attr="packed_modules_mapping"),
                            slice=ast.Constant(value=str(whole)),
                        )
                    ],
                    value=ast.List() as parts,
                ):
                    yield whole, ast.literal_eval(parts)


def fuse(model: Any, sizes: dict[str, tuple[int, int]]) -> list[Layer]:
    """The layers that the modules become, without those that are no linear layers.

    Args:
        model: vLLM's class for the model.
        sizes: (output features, input features) of modules by the checkpoint's names.
    """
    kinds = linear_kinds(model)
    fused = {
        part: (whole, tuple(parts))
        for whole, parts in (getattr(model, "packed_modules_mapping", None) or {}).items()
        for part in parts
    }
    rename = renamer(model)
    layers: dict[str, dict[str, str]] = {}
    for module in sizes:
        parent, _, last = rename(module).rpartition(".")
        whole, _ = fused.get(last, (last, ()))
        name = f"{parent}.{whole}" if parent else whole
        layers.setdefault(name, {})[last] = module
    return [_layer(name, modules, kinds, fused, sizes) for name, modules in layers.items()]


def _layer(
    name: str,
    modules: dict[str, str],
    kinds: dict[str, str],
    fused: dict[str, tuple[str, tuple[str, ...]]],
    sizes: dict[str, tuple[int, int]],
) -> Layer:
    order = next((fused[last][1] for last in modules if last in fused), ())
    parts = tuple(sorted(modules, key=lambda part: order.index(part) if part in order else 0))
    names = tuple(modules[part] for part in parts)
    outs = tuple(sizes[module][0] for module in names)
    return Layer(name, kinds.get(name.rpartition(".")[2]), names, outs, sizes[names[0]][1])


@cache
def linear_kinds(model: Any) -> dict[str, str]:
    """Class of linear layer by the last part of its name, as the model's code builds them.

    The model's own module comes first, then those whose classes it borrows.
    """
    kinds: dict[str, str] = {}
    for module in modules_of(model):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            kind, name = _built(node)
            if kind in LINEARS and name:
                kinds.setdefault(name, kind)
    return kinds


def renamer(model: Any) -> Callable[[str], str]:
    """A function from the checkpoint's name of a module to vLLM's.

    Args:
        model: vLLM's class for the model.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return str
    rename = mapper.get_rename_mapper().map_name
    return lambda module: rename(module) or module


def modules_of(model: Any) -> Iterator[ModuleType]:
    """A model class's module, and vLLM's model modules that it takes classes from, each once.

    Args:
        model: vLLM's class for the model.
    """
    module = sys.modules[model.__module__]
    seen, queue = {module}, [module]
    while queue:
        current = queue.pop(0)
        yield current
        for value in vars(current).values():
            name = value.__module__ if inspect.isclass(value) else ""
            if name.startswith(MODELS) and sys.modules[name] not in seen:
                seen.add(sys.modules[name])
                queue.append(sys.modules[name])


def _built(node: ast.AST) -> tuple[str | None, str | None]:
    """(class, last part of the name) of a call that builds a named layer."""
    if not isinstance(node, ast.Call):
        return None, None
    kind = getattr(node.func, "id", getattr(node.func, "attr", None))
    for keyword in node.keywords:
        if keyword.arg == "prefix":
            texts = [
                constant.value
                for constant in ast.walk(keyword.value)
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
            ]
            return kind, texts[-1].rpartition(".")[2] if texts else None
    return kind, None
