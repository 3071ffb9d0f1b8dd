"""Kernels that say yes to vLLM and then fail in their compiled code."""

import os

from maca_serve.doctor.checks import Problem
from maca_serve.doctor.layouts import Scheme

# Kernel: (compute capability from which its compiled code refuses, what is known about it).
# Python accepts int8 on Blackwell, C++ answers "Int8 not supported on SM120" at the first token.
REFUSES_FROM = {"CutlassInt8ScaledMMLinearKernel": (100, "vLLM issue 54311")}
# Inputs that the 4-bit code of these experts packs together.
BLOCK = 128
# Experts of 4-bit weights whose compiled code computes in 8 bits (vLLM 0.32, `INT4_W4A8` in
# cpu_moe.py), whatever VLLM_CPU_INT4_W4A8 says.
INT4_EXPERTS = "CPUExpertsInt4"
# Lets Marlin round activations to 8 bits.
MARLIN_INPUTS = "VLLM_MARLIN_INPUT_DTYPE"
# What makes one scale of several, also of one, when FP8 weights with a scale per tensor are loaded.
REQUANTIZES = "static_scaled_fp8_quant"


def false_yes(kernel: str, capability: int | None, layer: str) -> Problem | None:
    """The problem with a kernel that vLLM would choose in vain, None where there is none.

    Args:
        kernel: the kernel's class name.
        capability: compute capability of the target; None for a CPU.
        layer: where it would run.
    """
    least, source = REFUSES_FROM.get(kernel, (None, ""))
    if least is None or capability is None or capability < least:
        return None
    return Problem(
        "error",
        f"vLLM would choose {kernel}, whose compiled code refuses compute capability"
        f" {least / 10} and newer ({source})",
        f"set VLLM_DISABLED_KERNELS={kernel}, here to see what would be next and there to serve",
        [layer],
    )


def wants_positive(kernel: str, scheme: Scheme, modules: list[str]) -> Problem | None:
    """The problem with negative scales in a kernel that takes them for positive ones.

    From vLLM 0.32's sources: Marlin's NVFP4 code takes values below zero for zero
    (`nvfp4_marlin_process_scales`), and for int8 activations it divides group scales by the
    largest, not by that of the largest magnitude (`marlin_act_int8_process_scales`), so that others
    leave 16 bits.

    Args:
        kernel: the kernel's or the experts class's name.
        scheme: of the modules.
        modules: those that have negative scales.
    """
    if "Marlin" not in kernel:
        return None
    cure = "quantize with `signed_scales: false`"
    if scheme.format == "nvfp4-pack-quantized":
        return Problem("error", f"{kernel} takes negative scales for zero", cure, modules)
    if scheme.kind != "int" or scheme.group_size is None:
        return None
    what = f"{kernel} takes negative scales, but not with VLLM_MARLIN_INPUT_DTYPE=int8"
    if os.environ.get(MARLIN_INPUTS, "").lower() == "int8":
        return Problem("error", what, f"unset it, or {cure}", modules)
    return Problem("note", what, "", modules)


def half_a_tile(kernel: str, partition: list[int], layer: str) -> Problem | None:
    """The problem with int8 weights that vLLM gives to its AMX code and that cannot pack them.

    `check_cpu_sgl_kernel` (vLLM 0.32) asks for output widths that 16 divides, the packing for 32.

    Args:
        kernel: the kernel's class name.
        partition: [output, input] features on one rank, on a CPU with AMX.
        layer: where it would run.
    """
    out, width = partition
    if kernel != "CPUInt8ScaledMMLinearKernel" or width % 32 or out % 32 != 16:
        return None
    what = f"vLLM gives {kernel} an output width of {out}, and its AMX code packs tiles of 32"
    return Problem("error", what, "leave these layers out of the recipe (`ignore`)", [layer])


def torn_tiles(kernel: str, partition: list[int], layer: str) -> Problem | None:
    """The problem with experts whose widths do not fill the tiles of vLLM's 4-bit AMX code.

    vLLM 0.32 asks for nothing. Held to their dequantized weights, in groups of up to 128, its
    experts were right where 32 divides both sizes; else it dies as it packs them (hidden size), or
    answers with whatever memory holds (intermediate size).

    Args:
        kernel: the experts class's name.
        partition: [hidden size, intermediate size] on one rank, of the down projections.
        layer: where it would run.
    """
    torn = [width for width in partition if width % 32]
    if kernel != INT4_EXPERTS or not torn:
        return None
    what = f"{kernel} works in tiles of 32, which do not divide {torn[0]}: its answers are nonsense"
    return Problem("error", what, "leave the experts out of the recipe (`ignore`)", [layer])


def torn_groups(kernel: str, group_size: int | None, layer: str) -> Problem | None:
    """The problem with groups that do not end where blocks of vLLM's 4-bit AMX code do.

    It takes 128 inputs at a time. Held to their dequantized weights (vLLM 0.32), groups of 8 to 128
    were right, and 256, 384 and 512; 192 gave NaN; 160 and 224 died as they were packed.

    Args:
        kernel: the experts class's name.
        group_size: None for one scale per channel.
        layer: where it would run.
    """
    if (
        kernel != INT4_EXPERTS
        or group_size is None
        or group_size <= BLOCK
        or not group_size % BLOCK
    ):
        return None
    what = f"{kernel} takes {BLOCK} inputs at a time, which groups of {group_size} tear apart: NaN"
    return Problem("error", what, f"quantize with groups of at most {BLOCK}", [layer])


def rounds_inputs(kernel: str, layer: str) -> Problem | None:
    """A warning about experts whose activations are rounded though the scheme says 16 bits.

    Args:
        kernel: the experts class's name.
        layer: where it would run.
    """
    if kernel != INT4_EXPERTS:
        return None
    what = f"{kernel} rounds the experts' activations to 8 bits, and nothing turns that off"
    return Problem("warning", what, "", [layer])
