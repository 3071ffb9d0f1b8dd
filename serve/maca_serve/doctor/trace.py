"""What each of vLLM's kernels said when it was asked whether it can run a layer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from maca_serve.doctor.simulation import Availability

QUESTIONS = ("get_min_capability", "is_supported", "can_implement")
# The last question: vLLM takes the first kernel, or experts class, that says yes to it.
DECIDING = ("can_implement", "is_supported_config")

CANNOT_BE_ASKED = "cannot be asked here"


@dataclass
class Trace:
    """The answers about one layer, in vLLM's order.

    Attributes:
        refused: (kernel, reason, missing packages it asked for).
        chosen: the kernel that accepted, None when none did.
        chosen_needs: missing packages that it was told are there.
    """

    refused: list[tuple[str, str, list[str]]] = field(default_factory=list)
    chosen: type | None = None
    chosen_needs: list[str] = field(default_factory=list)


class Recorder:
    """Wraps the questions that vLLM asks of its kernel classes; the answers stay vLLM's."""

    def __init__(
        self, availability: Availability, capability: int | None, *, forgiving: bool
    ) -> None:
        """Prepare.

        Args:
            availability: who answers for optional packages.
            capability: compute capability of the target; None for a CPU.
            forgiving: take a kernel that fails over a question for one that refuses, and say so;
                for a simulated card, whose compiled code is not here to be called.
        """
        self.forgiving = forgiving
        self._availability = availability
        self._capability = capability
        self._depth = 0
        self._needs: dict[type, set[str]] = {}
        self.trace = Trace()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what every kernel of vLLM's lists answers inside the block."""
        own = {(kernel, name): vars(kernel).get(name) for kernel in kernels() for name in QUESTIONS}
        asked = [(kernel, name) for kernel, name in own if hasattr(kernel, name)]
        # All are read before any is changed: some kernels inherit from others.
        originals = [getattr(kernel, name) for kernel, name in asked]
        for (kernel, name), original in zip(asked, originals, strict=True):
            setattr(kernel, name, self.wrap(kernel, name, original))
        try:
            yield
        finally:
            for kernel, name in asked:
                if own[kernel, name] is None:
                    delattr(kernel, name)
                else:
                    setattr(kernel, name, own[kernel, name])

    def start(self) -> Trace:
        """Begin the record of another layer."""
        self.trace = Trace()
        self._needs = {}
        return self.trace

    def wrap(self, kernel: type, name: str, original: Any) -> Any:
        """A question to a kernel, as a static method that notes the answer.

        Args:
            kernel: the class that is asked.
            name: of the question.
            original: the class's own.
        """

        def ask(*arguments: Any, **keywords: Any) -> Any:
            outermost = self._depth == 0
            if outermost:
                self._availability.clear()
            self._depth += 1
            try:
                answer = original(*arguments, **keywords)
            except Exception as error:
                # Nor is a package that is pretended to be there here to be called.
                forgiving = self.forgiving or self._availability.pretend
                if not (forgiving and outermost and name != "get_min_capability"):
                    raise
                answer = False, f"{CANNOT_BE_ASKED}: {type(error).__name__}: {error}"
            finally:
                self._depth -= 1
            if outermost:
                self._note(kernel, name, answer)
            return answer

        return staticmethod(ask)

    def _note(self, kernel: type, question: str, answer: Any) -> None:
        # One kernel is asked several questions, and may look for its package in any of them.
        missing = self._needs.setdefault(kernel, set())
        missing |= self._availability.missing
        needs = sorted(missing)
        if question == "get_min_capability":
            if self._capability is not None and answer > self._capability:
                self.refuse(kernel.__name__, f"needs compute capability {answer / 10}", [])
            return
        accepted, reason = answer
        if not accepted:
            self.refuse(kernel.__name__, str(reason), needs)
        elif question in DECIDING and self.trace.chosen is None:
            self.trace.chosen = kernel
            self.trace.chosen_needs = needs

    def refuse(self, kernel: str, reason: str, needs: list[str]) -> None:
        """Note that a kernel is refused, unless one was chosen before it.

        Args:
            kernel: its class name.
            reason: as vLLM says it.
            needs: missing packages that it asked for.
        """
        # vLLM asks for the capability twice, once to compare and once for its message.
        seen = any(name == kernel for name, _, _ in self.trace.refused)
        if self.trace.chosen is None and not seen:
            self.trace.refused.append((kernel, " ".join(reason.split()), needs))


@contextmanager
def accepting() -> Iterator[None]:
    """Let every kernel of vLLM's lists say yes inside the block."""
    with ExitStack() as stack:
        for kernel in kernels():
            for name in QUESTIONS[1:]:
                if hasattr(kernel, name):
                    stack.enter_context(patch.object(kernel, name, staticmethod(say_yes)))
        yield


def say_yes(*_: Any, **__: Any) -> tuple[bool, None]:
    """A kernel's answer to each question but the one about its capability."""
    return True, None


def kernels() -> list[type]:
    """Every kernel class in vLLM's lists of possible linear kernels, all platforms."""
    from vllm.model_executor.kernels import linear

    lists = [value for name, value in vars(linear).items() if name.startswith("_POSSIBLE_")]
    found = (kernel for by_platform in lists for many in by_platform.values() for kernel in many)
    return list(dict.fromkeys(found))
