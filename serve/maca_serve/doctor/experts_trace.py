"""What vLLM's experts classes said when they were asked whether they can run a layer of experts.

Each quantization method has an oracle that goes through backends in vLLM's order: it may know of a
reason against a backend, else it asks the backend's experts classes. Some of those are imported
only then, so they are wrapped as the oracle comes by them.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

from maca_serve.doctor.simulation import Availability, packages_of_experts
from maca_serve.doctor.trace import CANNOT_BE_ASKED, Recorder, say_yes

_CLASSES_OF = "backend_to_kernel_cls"
_REASON_AGAINST = "_backend_incompatibility_reason"
_QUESTION = "is_supported_config"


@contextmanager
def recording_experts(recorder: Recorder, availability: Availability) -> Iterator[None]:
    """Record what vLLM's oracles of experts hear inside the block.

    Args:
        recorder: where to.
        availability: who answers for optional packages.
    """
    with ExitStack() as stack, packages_of_experts(availability):
        watch = _watcher(recorder, stack)
        for oracle in oracles():
            listings = _listings(oracle)
            for name, function in listings.items():
                stack.enter_context(patch.object(oracle, name, watch(function)))
            if against := vars(oracle).get(_REASON_AGAINST):
                explain = _explainer(recorder, against, listings[_CLASSES_OF])
                stack.enter_context(patch.object(oracle, _REASON_AGAINST, explain))
        yield


@contextmanager
def accepting_experts() -> Iterator[None]:
    """Let every class of experts that this platform's backends have say yes inside the block."""
    with ExitStack() as stack:

        def accept(listing: Callable[[Any], list[type]]) -> Any:
            def list_classes(backend: Any) -> list[type]:
                classes = listing(backend)
                for experts in classes:
                    stack.enter_context(patch.object(experts, _QUESTION, staticmethod(say_yes)))
                return classes

            return list_classes

        for oracle in oracles():
            for name, function in _listings(oracle).items():
                stack.enter_context(patch.object(oracle, name, accept(function)))
            if _REASON_AGAINST in vars(oracle):
                stack.enter_context(patch.object(oracle, _REASON_AGAINST, lambda *_, **__: None))
        yield


def _listings(oracle: ModuleType) -> dict[str, Any]:
    """An oracle's functions that list classes of experts."""
    return {
        name: function
        for name, function in vars(oracle).items()
        if name.endswith(_CLASSES_OF) and inspect.isfunction(function)
    }


def oracles() -> list[ModuleType]:
    """vLLM's modules that choose experts classes, one for each kind of quantization."""
    from vllm.model_executor.layers.fused_moe import oracle

    found = pkgutil.iter_modules(oracle.__path__, f"{oracle.__name__}.")
    return [import_module(module.name) for module in found]


def _watcher(recorder: Recorder, stack: ExitStack) -> Callable[[Any], Any]:
    """A wrapper of functions that list classes, which wraps the listed classes' answers."""
    watched: set[type] = set()

    def watch(listing: Callable[[Any], list[type]]) -> Any:
        def list_classes(backend: Any) -> list[type]:
            try:
                classes = listing(backend)
            except ImportError as error:
                if not recorder.forgiving:
                    raise
                recorder.refuse(backend.value, f"{CANNOT_BE_ASKED}: {error}", [])
                return []
            for experts in set(classes) - watched:
                answer = recorder.wrap(experts, _QUESTION, getattr(experts, _QUESTION))
                stack.enter_context(patch.object(experts, _QUESTION, answer))
                watched.add(experts)
            return classes

        return list_classes

    return watch


def _explainer(recorder: Recorder, against: Any, listing: Any) -> Callable[..., str | None]:
    """A wrapper of the function that knows reasons against whole backends."""

    def explain(backend: Any, *arguments: Any, **keywords: Any) -> str | None:
        reason: str | None = against(backend, *arguments, **keywords)
        if reason is not None:
            for name in _names(listing, backend):
                recorder.refuse(name, reason, [])
        return reason

    return explain


def _names(listing: Any, backend: Any) -> list[str]:
    """Names of a backend's classes; its own where they cannot be imported, as vLLM does not."""
    try:
        return [experts.__name__ for experts in listing(backend)]
    except ImportError:
        return [backend.value]
