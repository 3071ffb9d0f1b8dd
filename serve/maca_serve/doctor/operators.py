"""Compiled operators that vLLM's build here lacks: Python chooses a kernel without looking."""

import inspect
import re
from typing import Any

import torch

from maca_serve.doctor.traps import REQUANTIZES

_TORCH_OP = re.compile(r"torch\.ops\._C\.(\w+)")


def missing_ops(kernel: type, scheme: Any) -> list[str]:
    """Operators that loading or running a layer wants and the build does not have.

    `can_implement` does not look: vLLM's AVX2 build accepts W4A16 and fails at the first token
    (vLLM issue 55613). A kernel names several when it has several ways; one is enough.

    Args:
        kernel: the chosen class.
        scheme: the layer's scheme or method.
    """
    names = _named_in(kernel)
    missing = [name for name in names if not is_built(torch.ops._C, name)]
    found = missing if len(missing) == len(names) else []
    if _has_scale_per_tensor(scheme) and not is_built(torch.ops._C, REQUANTIZES):
        found.append(REQUANTIZES)
    return sorted(found)


def is_built(namespace: Any, name: str) -> bool:
    """Whether an operator is there, and not as a stub that takes no arguments."""
    operator = getattr(namespace, name, None)
    if operator is None:
        return False
    return any(getattr(operator, o)._schema.arguments for o in operator.overloads())


def _named_in(kernel: type) -> set[str]:
    from vllm import _custom_ops

    names = set()
    for name in _called_in(kernel):
        function = getattr(_custom_ops, name, None)
        if inspect.isfunction(function):
            names |= set(_TORCH_OP.findall(inspect.getsource(function)))
    return names


def _called_in(kernel: type) -> list[str]:
    """Names of functions that a kernel, or a class of experts, calls to run a layer."""
    if hasattr(kernel, "apply_weights"):
        return re.findall(r"\bops\.(\w+)\(", inspect.getsource(kernel.apply_weights))
    # Experts import the functions themselves.
    source = inspect.getsource(kernel.apply) if hasattr(kernel, "apply") else ""
    return re.findall(r"(?<![\w.])(\w+)\(", source)


def _has_scale_per_tensor(scheme: Any) -> bool:
    strategy = getattr(scheme, "strategy", None)
    return "Fp8" in type(scheme).__name__ and getattr(strategy, "value", strategy) == "tensor"
