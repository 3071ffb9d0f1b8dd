"""What is wrong with one layer, or worth knowing, from vLLM's answer about it."""

from collections.abc import Iterator
from typing import Any

from maca_serve.doctor.checks import Problem
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.doctor.simulation import PACKAGES
from maca_serve.doctor.speeds import no_faster
from maca_serve.doctor.straddling import torn_words
from maca_serve.doctor.traps import (
    REQUANTIZES,
    false_yes,
    half_a_tile,
    rounds_inputs,
    torn_groups,
    torn_tiles,
)

Entry = dict[str, Any]
# To be replaced where no change that was tried helps.
CHANGES = "make one of the changes below"
# So vLLM says that it has no code, with all arguments after it, or stumbles over what is missing.
_NO_SCHEME = ("No compressed-tensors compatible scheme was found", "AttributeError: 'NoneType'")
# So vLLM's experts classes say what they are not for.
_OTHER_DEVICE = "does not support current device"


def layer_problems(
    entry: Entry, config: dict[str, Any], answer: Entry, here: Entry | None
) -> list[Problem]:
    """Problems of a layer that is quantized.

    Args:
        entry: a layer of the worker's answer, completed.
        config: the model's.
        answer: the whole answer.
        here: this machine, None where another is asked about.
    """
    if not entry["quantized"]:
        return []
    return [
        *_of_kernel(entry, config, answer, here),
        *_of_compiled_code(entry, answer, here),
        *_of_second_choices(entry, config),
        *_of_scheme(entry, config),
        *_of_ranks(entry, answer),
    ]


def packages_in_words(needs: list[str]) -> str:
    """Import names as what pip calls them."""
    return ", ".join(PACKAGES[name] for name in needs)


def _of_kernel(
    entry: Entry, config: dict[str, Any], answer: Entry, here: Entry | None
) -> Iterator[Problem]:
    """No kernel, or one that the build here cannot run."""
    if entry["kernel"] is None:
        yield _no_kernel(entry, config, answer)
    elif entry["missing_ops"]:
        ops, flags = ", ".join(entry["missing_ops"]), ", ".join(here["cpu_flags"] if here else [])
        what = f"vLLM would choose {entry['kernel']}, and its build here lacks {ops}"
        cure = f"serve it on a CPU with AVX-512; this one has {flags or 'no vector extensions'}"
        if REQUANTIZES in entry["missing_ops"]:
            cure = "quantize with a scale per channel or per block (FP8_DYNAMIC, FP8_BLOCK)"
        yield Problem("error", what, cure, [entry["layer"]])


def _no_kernel(entry: Entry, config: dict[str, Any], answer: Entry) -> Problem:
    offer = entry["with_packages"]
    if offer:
        needs = packages_in_words(offer["needs"])
        severity = "warning" if answer["target"]["simulated"] else "error"
        what = f"no kernel without {needs}; with it: {offer['kernel']}"
        return Problem(severity, what, f"pip install {needs}", [entry["layer"]])
    error = (entry["error"] or "vLLM chose no kernel").split(" Reasons:")[0]
    if entry.get("experts") and error.startswith("NotImplementedError"):
        error = _no_experts_class(entry)
    if any(words in error for words in _NO_SCHEME):
        error = f"vLLM has no code for {_in_words(entry['parts'][0], config)}"
    return Problem("error", error, CHANGES, [entry["layer"]])


def _in_words(module: str, config: dict[str, Any]) -> str:
    """A module's scheme, of which vLLM's error prints all arguments."""
    find = scheme_finder(config["quantization_config"])
    scheme = find(module) if find else None
    if scheme is None:
        return "this scheme"
    words = f"weights of {scheme.bits} bits ({scheme.kind}, one scale per {scheme.strategy})"
    if scheme.inputs is None:
        return f"{words} alone"
    how = "stored" if scheme.inputs.static else "dynamic"
    return (
        f"{words} with activations of {scheme.inputs.bits} bits ({scheme.inputs.kind}, {how} scales"
        f" per {scheme.inputs.strategy})"
    )


def _no_experts_class(entry: Entry) -> str:
    """What vLLM does not say in its error: the reasons, but for classes of other devices."""
    reasons = [
        f"{refusal['kernel']}: {refusal['reason']}"
        for refusal in entry["refusals"]
        if _OTHER_DEVICE not in refusal["reason"]
    ]
    return "; ".join(["none of vLLM's experts classes supports this", *reasons])


def _of_compiled_code(entry: Entry, answer: Entry, here: Entry | None) -> Iterator[Problem]:
    """What is known about the chosen kernel and vLLM's Python does not say."""
    kernel, name = entry["kernel"] or "", [entry["layer"]]
    if trap := false_yes(kernel, answer["target"]["capability"], entry["layer"]):
        yield trap
    on_amx = here is not None and "amx_int8" in here["cpu_flags"]
    part = entry["partition"] if on_amx else None
    if part and (tile := half_a_tile(kernel, part, entry["layer"])):
        yield tile
    if here and (slow := no_faster(kernel, here, entry["layer"])):
        yield slow
    if entry.get("down") and (torn := torn_tiles(kernel, entry["down"]["partition"], *name)):
        yield torn
    if rounding := rounds_inputs(kernel, entry["layer"]):
        yield rounding
    by = {
        "CPUWNA16LinearKernel": "AMX" if on_amx else None,
        "ZentorchWNA16LinearKernel": "zentorch",
    }
    if by.get(kernel):
        what = f"with {by[kernel]} plain `vllm serve` would round activations to 8 bits"
        cure = "serve with `maca-serve up`, or set VLLM_CPU_INT4_W4A8=0"
        yield Problem("note", what, cure, name)


def _of_second_choices(entry: Entry, config: dict[str, Any]) -> Iterator[Problem]:
    """A kernel that is not what the scheme was made for."""
    kernel, name = entry["kernel"] or "", [entry["layer"]]
    if entry["falls_back_from"]:
        reason = _reason(entry, entry["falls_back_from"])
        what = f"falls back from {entry['falls_back_from']} to {kernel}: {reason}"
        yield Problem("warning", what, "", name)
    if entry.get("own_code") or kernel.startswith("Emulation"):
        what = f"runs on {kernel}, which is none of vLLM's optimized kernels"
        yield Problem("warning", what, "", name)
    if "A16" in (entry["scheme"] or "") and _quantizes_inputs(config):
        what = f"runs as {entry['scheme']}: activations stay at 16 bits on this target"
        yield Problem("warning", what, "", name)


def _reason(entry: Entry, kernel: str) -> str:
    reasons = (r["reason"] for r in entry["refusals"] if r["kernel"] == kernel)
    return next(reasons, "refused for this shape")


def _quantizes_inputs(config: dict[str, Any]) -> bool:
    groups = (config["quantization_config"].get("config_groups") or {}).values()
    return any(group.get("input_activations") for group in groups)


def _of_scheme(entry: Entry, config: dict[str, Any]) -> Iterator[Problem]:
    """Groups and words that the chosen code reads wrongly."""
    find = scheme_finder(config["quantization_config"])
    scheme = find(entry["parts"][0]) if find else None
    if scheme is None:
        return
    if torn := torn_groups(entry["kernel"] or "", scheme.group_size, entry["layer"]):
        yield torn
    # Experts have two matrices, of which the second is cut along its input.
    for matrix in (entry, entry | (entry.get("down") or {})):
        if torn := torn_words(matrix, scheme):
            yield torn
            return


def _of_ranks(entry: Entry, answer: Entry) -> Iterator[Problem]:
    if entry["class"] is None and answer["target"]["tensor_parallel"] > 1:
        what = "vLLM's code does not say how it is split over ranks; asked as if it were not"
        yield Problem("warning", what, "", [entry["layer"]])
