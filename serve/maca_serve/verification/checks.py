"""A check and its outcome, and those that read the engine's log."""

from dataclasses import asdict, dataclass, field
from typing import Any

from maca_serve.engine.enginelog import (
    find_experts,
    find_kernels,
    find_weights_memory,
    name_experts,
)

PASS, FAIL, NOT_CHECKED = "pass", "fail", "not checked"
GIB = 1024**3
# Scratch space and padding, of which a small model has relatively more. A layer that fell back to
# 16 bits takes four times its codes.
MEMORY_SHARE = 0.10
MEMORY_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Check:
    """One row of the result.

    Attributes:
        name: what was checked.
        status: PASS, FAIL or NOT_CHECKED.
        found: what was found, or why it was not checked.
        limit: what it was held to; empty where it was not.
        numbers: the same for programs.
    """

    name: str
    status: str
    found: str
    limit: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """As it goes into the JSON answer."""
        return asdict(self)


def held(name: str, passed: bool, found: str, limit: str, /, **numbers: Any) -> Check:
    """A check that was made; `numbers` are the same for programs."""
    return Check(name, PASS if passed else FAIL, found, limit, numbers)


def not_checked(name: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(name, NOT_CHECKED, reason)


def check_kernel(lines: list[str], layers: list[dict[str, Any]] | None) -> Check:
    """Whether the engine's log names the kernels that the doctor predicted, and no others.

    Args:
        lines: of the log.
        layers: the doctor's, see `maca_serve.doctor.findings`; None for a model without codes.
    """
    name = "kernel"
    if layers is None:
        return not_checked(name, "not quantized, so vLLM chooses no low-bit kernel")
    quantized = [layer for layer in layers if layer["quantized"]]
    # Code that is a method's own has the method's name, and vLLM does not log it.
    predicted = sorted({_named(layer) for layer in quantized if layer["kernel"] != layer["scheme"]})
    running = sorted(find_kernels(lines) + find_experts(lines))
    if not predicted:
        return not_checked(name, "the doctor predicts none of the kernels that vLLM's log names")
    return held(
        name,
        predicted == running,
        ", ".join(running) or "none named in vLLM's log",
        f"the doctor's: {', '.join(predicted)}",
        running=running,
        predicted=predicted,
    )


def _named(layer: dict[str, Any]) -> str:
    """A layer's kernel as vLLM's log names it."""
    return name_experts(layer["backend"]) if layer["backend"] else str(layer["kernel"])


def check_memory(lines: list[str], promised: int, ranks: int = 1) -> Check:
    """Whether the weights take what the checkpoint's files hold.

    Args:
        lines: of the log.
        promised: bytes of the files with the weights.
        ranks: that share them.
    """
    name = "memory of weights"
    if ranks > 1:
        return not_checked(name, f"{ranks} ranks hold parts, and each all that is not divided")
    taken = find_weights_memory(lines)
    if taken is None:
        return not_checked(name, "vLLM's log names none (its CPU engine never does)")
    tolerance = MEMORY_SHARE * promised + MEMORY_BYTES
    return held(
        name,
        abs(taken - promised) <= tolerance,
        f"{taken / GIB:.2f} GiB",
        f"{promised / GIB:.2f} GiB in the files, ± {tolerance / GIB:.2f}"
        f" ({MEMORY_SHARE:.0%} and {MEMORY_BYTES >> 20} MiB)",
        taken_bytes=taken,
        promised_bytes=promised,
        tolerance_bytes=round(tolerance),
    )
