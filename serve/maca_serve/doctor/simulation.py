"""vLLM's platform turned into a card that is not here; packages and compiled code that are not.

Every module of vLLM holds the same platform object, so changing that object's class reaches all
of them, also those that are imported already: importing vLLM's CUDA side without CUDA fails.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

# What vLLM's messages and `pip install` call the packages that its code looks for.
PACKAGES = {
    "humming": "humming-kernels",
    "conch": "conch-triton-kernels",
    # The kernels that FlashInfer, which vLLM's CUDA build requires, would else make with nvcc.
    "flashinfer": "flashinfer-cubin",
    "deep_gemm": "deep-gemm",
    "fbgemm_gpu": "fbgemm-gpu-genai",
    # Built for one release of torch: what vLLM's extra `zen` asks for.
    "zentorch": "zentorch==2.13.0.1",
}


# What vLLM's CUDA build brings along: 0.32.0 requires the one and has the other in its wheel. It
# requires FlashInfer, too, which then counts only where nvcc and ninja are found.
WITH_CUDA = frozenset({"humming", "deep_gemm"})


# The only answers of vLLM's that stand in C++ (csrc/libtorch_stable/quantization, CUDA 12.8 and
# newer): the least compute capability for which each says yes.
COMPILED = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
    "cutlass_group_gemm_supported": 90,
}


class Availability:
    """Answers whether optional packages are there, and remembers who asked.

    Attributes:
        pretend: say yes for what is not installed.
        missing: import names that were asked for since the last `clear` and are not installed.
    """

    def __init__(self, brought: frozenset[str] = frozenset()) -> None:
        """Nobody has asked yet.

        Args:
            brought: import names of what comes with a build of vLLM that is not the one here.
        """
        self._brought = brought
        self.pretend = False
        self.missing: set[str] = set()

    def clear(self) -> None:
        """Forget what was asked for."""
        self.missing = set()

    def answer(self, name: str, installed: bool) -> bool:
        """Whether to say that the package is there."""
        if installed or name in self._brought:
            return True
        if name not in PACKAGES:
            return False
        self.missing.add(name)
        return self.pretend


def simulate(capability: int, compiled: bool) -> None:
    """Turn vLLM's platform into a CUDA card for the rest of this process.

    Args:
        capability: compute capability, 90 for 9.0.
        compiled: whether the vLLM installed here is the CUDA build.
    """
    import vllm.platforms as platforms
    from vllm.platforms.interface import DeviceCapability

    here = platforms.current_platform
    base = type(here) if compiled else _cuda_platform()

    class SimulatedCard(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*divmod(capability, 10))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"a simulated card of compute capability {capability / 10}"

        @classmethod
        def has_device_capability(cls, wanted: Any, device_id: int = 0) -> bool:
            number = wanted[0] * 10 + wanted[1] if isinstance(wanted, tuple) else int(wanted)
            return capability >= number

    here.__class__ = SimulatedCard


def _cuda_platform() -> type:
    """vLLM's CUDA platform class, in a build without its compiled part."""
    name = "vllm._C_stable_libtorch"
    with patch.dict(sys.modules, {name: ModuleType(name)}):
        from vllm.platforms.cuda import CudaPlatformBase
    return CudaPlatformBase


def recompute(capability: int) -> None:
    """What vLLM's CUDA build computed on the card at hand, for the one simulated.

    Args:
        capability: of the simulated card.
    """
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass

    least = COMPILED["cutlass_scaled_mm_supports_block_fp8"]
    cutlass.CUTLASS_BLOCK_FP8_SUPPORTED = capability >= least


def assume_compiled(capability: int) -> None:
    """Answer for the compiled half of vLLM's CUDA build, where it is not installed.

    Args:
        capability: of the simulated card.
    """
    answers = {name: _always(capability >= least) for name, least in COMPILED.items()}
    holders = [module for name, module in sys.modules.items() if name.startswith("vllm.")]
    for module in holders:
        for name, function in answers.items():
            if name in vars(module):
                setattr(module, name, function)
    recompute(capability)


def _always(value: bool) -> Callable[..., bool]:
    # Asked of the operator with a capability, of vLLM's function around it without.
    return lambda *capability: value


@contextmanager
def packages(availability: Availability) -> Iterator[None]:
    """Let `availability` answer for vLLM's kernels inside the block."""
    from vllm.utils import flashinfer, import_utils

    has_module = import_utils._has_module

    def has(name: str) -> bool:
        return availability.answer(name, has_module(name))

    def find(name: str, package: str | None = None) -> Any:
        spec = find_spec(name, package)
        return spec or (True if availability.answer(name, False) else None)

    def has_flashinfer() -> bool:
        return availability.answer("flashinfer", flashinfer.has_flashinfer.__wrapped__())

    names: dict[str, Callable[..., Any]] = {"find_spec": find, "has_flashinfer": has_flashinfer}
    with ExitStack() as stack:
        if _may_become_zen():

            def is_zen(*_: Any) -> bool:
                return availability.answer("zentorch", False)

            stack.enter_context(patch.object(_platform(), "is_zen_cpu", is_zen))
            names["has_zentorch_op"] = is_zen
        stack.enter_context(patch.object(import_utils, "_has_module", has))
        for one in _patches(("vllm.model_executor.kernels.linear",), names):
            stack.enter_context(one)
        yield


def _may_become_zen() -> bool:
    """Whether this is a CPU that vLLM would have kernels of AMD's for, were zentorch installed."""
    from vllm.platforms import _is_amd_zen_cpu

    platform = _platform()
    return bool(platform.is_cpu() and not platform.is_zen_cpu() and _is_amd_zen_cpu())


def _platform() -> Any:
    from vllm.platforms import current_platform

    return current_platform


@contextmanager
def packages_of_experts(availability: Availability) -> Iterator[None]:
    """Let `availability` answer for vLLM's classes of experts, too, inside a block of `packages`.

    They look for single functions in FlashInfer, which is pretended whole, they ask humming for
    names, and DeepGEMM's answer is kept by vLLM from the first time on.
    """
    from vllm.utils import deep_gemm, flashinfer

    asked = deep_gemm.is_deep_gemm_supported.__wrapped__
    names: dict[str, Callable[..., Any]] = {"is_deep_gemm_supported": asked}
    if not flashinfer.has_flashinfer():
        questions = (name for name in vars(flashinfer) if name.startswith("has_flashinfer"))
        names |= dict.fromkeys(questions, lambda: availability.answer("flashinfer", False))
    parts = ("vllm.utils.", "vllm.model_executor.layers.fused_moe")
    with ExitStack() as stack:
        if find_spec("humming") is None:
            stack.enter_context(patch.dict(sys.modules, {"vllm.utils.humming": _Humming}))
        for one in _patches(parts, names):
            stack.enter_context(one)
        yield


class _Names(type):
    """Of a class that has everything, under its own name."""

    def __getattr__(cls, name: str) -> Any:
        return SimpleNamespace(value=name)


class _GemmType(metaclass=_Names):
    pass


_Humming: Any = SimpleNamespace(GemmType=_GemmType)


def _patches(parts: tuple[str, ...], names: dict[str, Callable[..., Any]]) -> list[Any]:
    """Patches of functions that vLLM's modules below `parts` hold by name."""
    holders = [module for name, module in sys.modules.items() if name.startswith(parts)]
    return [
        patch.object(module, name, function)
        for module in holders
        for name, function in names.items()
        if name in vars(module)
    ]
