"""What vLLM's answers mean: does it load, what falls back, what to change."""

import re
from typing import Any

from maca_serve.doctor.checks import Contents, Problem, heads_misfit
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.doctor.simulation import PACKAGES
from maca_serve.doctor.speeds import no_faster
from maca_serve.doctor.straddling import torn_words
from maca_serve.doctor.traps import REQUANTIZES, false_yes, half_a_tile
from maca_serve.machine import describe_machine

Entry = dict[str, Any]
LOADS, CONDITIONAL, FAILS, UNKNOWN = "loads", "conditional", "does not load", "unknown"
_FOR_LAYER = re.compile(r" for layer '[^']*'")
_NUMBER = re.compile(r"\b\d+\b")
_CHANGES = "make one of the changes below"
_LOOK = ("class", "shape", "partition", "quantized", "scheme", "kernel", "error")


def describe(
    subject: str, scheme: str, config: dict[str, Any], contents: Contents, answer: Entry
) -> Entry:
    """Everything the doctor found, as JSON.

    Returns:
        `subject`, `scheme`, `vllm`; `target` (name, capability, simulated, compiled_code_assumed,
        tensor_parallel, dtype); `verdict` (`loads`, `conditional` on an optional package, `does
        not load`, or `unknown` where nobody was asked); `problems` (severity `error`, `warning` or
        `note`; what, cure, count, up to three modules); `layers`, one entry for all layers of one
        look: layer, count, class, parts, shape and partition as [output, input] features, scheme,
        kernel, refused [{kernel, reason, needs}], with_packages {kernel, needs, install} or null,
        falls_back_from, error; and `changes` that would help, [{change, kernels}].
    """
    layers = [_complete(entry) for entry in answer.get("layers", [])]
    problems = list(contents.problems)
    if answer["refused"]:
        problems.append(Problem("error", answer["refused"], "choose another format or target"))
    if answer["unasked"]:
        problems.append(_unasked(answer))
    problems += _heads(config, answer)
    here = None if _simulated(answer) else describe_machine()
    for entry in layers:
        problems += _layer_problems(entry, config, answer, here)
    problems += _stored_otherwise(layers, contents)
    problems += _experts(contents)
    problems = _merge(problems)
    changes = _helpful(layers, answer.get("variants", []))
    for problem in problems:
        if problem.cure == _CHANGES and not changes:
            problem.cure = "choose another scheme or target: no change that was tried helps"
    return {
        "subject": subject,
        "scheme": scheme,
        "vllm": answer["vllm"],
        "target": {**answer.get("target", {}), "dtype": answer.get("dtype")},
        "verdict": _verdict(problems, layers, answer),
        "problems": [problem.describe() for problem in problems],
        "layers": _group(layers),
        "changes": changes,
    }


def packages_in_words(needs: list[str]) -> str:
    """Import names as what pip calls them."""
    return ", ".join(PACKAGES[name] for name in needs)


def _complete(entry: Entry) -> Entry:
    if entry["error"]:
        # vLLM names the layer; the same error in another layer is the same error.
        entry = {**entry, "error": _FOR_LAYER.sub("", entry["error"])}
    # A method that asks no list of kernels runs code of its own, named like the method.
    if entry["quantized"] and entry["kernel"] is None and not entry["error"]:
        entry = {**entry, "kernel": entry["scheme"], "own_code": True}
    roomy = entry.get("roomy_kernel")
    fell = roomy if entry["kernel"] and roomy not in (None, entry["kernel"]) else None
    return {**entry, "falls_back_from": fell, "with_packages": entry.get("with_packages")}


def _layer_problems(
    entry: Entry, config: dict[str, Any], answer: Entry, here: Entry | None
) -> list[Problem]:
    """`here` is this machine, None where another is asked about."""
    if not entry["quantized"]:
        return []
    name, found = [entry["layer"]], []
    if entry["kernel"] is None:
        found.append(_no_kernel(entry, answer))
    elif entry["missing_ops"]:
        ops, flags = ", ".join(entry["missing_ops"]), ", ".join(here["cpu_flags"] if here else [])
        what = f"vLLM would choose {entry['kernel']}, and its build here lacks {ops}"
        cure = f"serve it on a CPU with AVX-512; this one has {flags or 'no vector extensions'}"
        if REQUANTIZES in entry["missing_ops"]:
            cure = "quantize with a scale per channel or per block (FP8_DYNAMIC, FP8_BLOCK)"
        found.append(Problem("error", what, cure, name))
    if trap := false_yes(entry["kernel"] or "", answer["target"]["capability"], entry["layer"]):
        found.append(trap)
    on_amx = here is not None and "amx_int8" in here["cpu_flags"]
    part = entry["partition"] if on_amx else None
    if part and (tile := half_a_tile(entry["kernel"] or "", part, entry["layer"])):
        found.append(tile)
    if here and (slow := no_faster(entry["kernel"] or "", here, entry["layer"])):
        found.append(slow)
    if entry["falls_back_from"]:
        reason = _reason(entry, entry["falls_back_from"])
        what = f"falls back from {entry['falls_back_from']} to {entry['kernel']}: {reason}"
        found.append(Problem("warning", what, "", name))
    if entry.get("own_code") or (entry["kernel"] or "").startswith("Emulation"):
        what = f"runs on {entry['kernel']}, which is none of vLLM's optimized kernels"
        found.append(Problem("warning", what, "", name))
    scheme = _scheme_of(entry, config)
    if scheme is not None and (torn := torn_words(entry, scheme)):
        found.append(torn)
    if "A16" in (entry["scheme"] or "") and _quantizes_inputs(config):
        what = f"runs as {entry['scheme']}: activations stay at 16 bits on this target"
        found.append(Problem("warning", what, "", name))
    if entry["class"] is None and answer["target"]["tensor_parallel"] > 1:
        what = "vLLM's code does not say how it is split over ranks; asked as if it were not"
        found.append(Problem("warning", what, "", name))
    if entry["kernel"] == "CPUWNA16LinearKernel" and on_amx:
        what = "this CPU has AMX: plain `vllm serve` would round activations to 8 bits"
        cure = "serve with `maca-serve up`, or set VLLM_CPU_INT4_W4A8=0"
        found.append(Problem("note", what, cure, name))
    return found


def _no_kernel(entry: Entry, answer: Entry) -> Problem:
    offer = entry["with_packages"]
    if offer:
        needs = packages_in_words(offer["needs"])
        severity = "warning" if _simulated(answer) else "error"
        what = f"no kernel without {needs}; with it: {offer['kernel']}"
        return Problem(severity, what, f"pip install {needs}", [entry["layer"]])
    error = (entry["error"] or "vLLM chose no kernel").split(" Reasons: ")[0]
    return Problem("error", error, _CHANGES, [entry["layer"]])


def _unasked(answer: Entry) -> Problem:
    reason = answer["unasked"]
    # Elsewhere the package may be there; here vLLM would fail in the same way.
    elsewhere = _simulated(answer) or reason.startswith("LookupError")
    severity = "warning" if elsewhere else "error"
    what = f"the model's layers are not known, so no kernel was asked for: {reason}"
    cure = "ask in an environment in which vLLM can serve this model"
    return Problem(severity, what, cure)


def _heads(config: dict[str, Any], answer: Entry) -> list[Problem]:
    """vLLM checks this before it builds any layer."""
    misfit = heads_misfit(config, answer.get("target", {}).get("tensor_parallel", 1))
    return [Problem("error", *misfit)] if misfit else []


def _stored_otherwise(layers: list[Entry], contents: Contents) -> list[Problem]:
    problems = []
    for entry in layers:
        stored = [part in contents.quantized for part in entry["parts"]]
        if any(stored) and not all(stored):
            last = entry["layer"].rpartition(".")[2]
            what = f"{last} fuses modules of which only some are quantized"
            cure = f"quantize all of {_last_names(entry['parts'])} alike, or none"
            problems.append(Problem("error", what, cure, [entry["layer"]]))
        elif entry["error"] is None and all(stored) != entry["quantized"]:
            how = "quantized" if entry["quantized"] else "not quantized"
            what = f"vLLM reads quantization_config as {how} here, and its tensors are otherwise"
            cure = "mend `ignore` and the targets in quantization_config"
            problems.append(Problem("error", what, cure, [entry["layer"]]))
    return problems


def _experts(contents: Contents) -> list[Problem]:
    experts = sorted(name for name in contents.quantized if ".experts." in name)
    what = "experts run in vLLM's fused mixture-of-experts kernels, which were not asked"
    return [Problem("warning", what, "", experts)] if experts else []


def _verdict(problems: list[Problem], layers: list[Entry], answer: Entry) -> str:
    if any(problem.severity == "error" for problem in problems):
        return FAILS
    quantized = [entry for entry in layers if entry["quantized"]]
    if not quantized or _only_experts_unknown(problems):
        return UNKNOWN
    return LOADS if all(entry["kernel"] for entry in quantized) else CONDITIONAL


def _only_experts_unknown(problems: list[Problem]) -> bool:
    return any("mixture-of-experts" in problem.what for problem in problems)


def _merge(problems: list[Problem]) -> list[Problem]:
    """Each problem once, with all its modules; errors first."""
    merged: dict[tuple[str, str, str], Problem] = {}
    for problem in problems:
        key = (problem.severity, problem.what, problem.cure)
        same = merged.setdefault(key, Problem(*key))
        same.modules += problem.modules
    order = ("error", "warning", "note")
    return sorted(merged.values(), key=lambda problem: order.index(problem.severity))


def _group(layers: list[Entry]) -> list[Entry]:
    """One entry for all layers of one look, with how many there are."""
    groups: dict[str, Entry] = {}
    for entry in layers:
        name = _NUMBER.sub("*", entry["layer"])
        look = repr([name, *(entry[key] for key in _LOOK), entry["refusals"]])
        parts = [_NUMBER.sub("*", part) for part in entry["parts"]]
        shown = {key: entry[key] for key in _LOOK}
        group = {"layer": name, "count": 0, "parts": parts, **shown}
        group |= {"refused": entry["refusals"], "with_packages": entry["with_packages"]}
        group["falls_back_from"] = entry["falls_back_from"]
        groups.setdefault(look, group)["count"] += 1
    return list(groups.values())


def _helpful(layers: list[Entry], variants: list[Entry]) -> list[Entry]:
    """Changes with which no layer gets a kernel further down vLLM's list, and some one higher up.

    Only asked for where something does not load or falls back: a change costs a new checkpoint.
    """
    quantized = {entry["layer"]: entry for entry in layers if entry["quantized"]}
    if not any(entry["falls_back_from"] or not entry["kernel"] for entry in quantized.values()):
        return []
    found = []
    for variant in variants:
        tried = [_complete(entry) for entry in variant["layers"] if entry["quantized"]]
        moves = [_place(entry) - _place(quantized[entry["layer"]]) for entry in tried]
        all_run = all(entry["kernel"] or entry["with_packages"] for entry in tried)
        if all_run and moves and max(moves) <= 0 and min(moves) < 0:
            kernels = sorted({entry["kernel"] for entry in tried if entry["kernel"]})
            found.append({"change": variant["change"], "kernels": kernels})
    return found


def _place(entry: Entry) -> int:
    """Place of a layer's kernel in vLLM's list; behind all where none, or only with a package."""
    if entry["kernel"]:
        return len(entry["refusals"])
    return 1000 if entry["with_packages"] else 10000


def _reason(entry: Entry, kernel: str) -> str:
    reasons = (r["reason"] for r in entry["refusals"] if r["kernel"] == kernel)
    return next(reasons, "refused for this shape")


def _scheme_of(entry: Entry, config: dict[str, Any]) -> Any:
    find = scheme_finder(config["quantization_config"])
    return find(entry["parts"][0]) if find else None


def _quantizes_inputs(config: dict[str, Any]) -> bool:
    groups = (config["quantization_config"].get("config_groups") or {}).values()
    return any(group.get("input_activations") for group in groups)


def _simulated(answer: Entry) -> bool:
    return bool(answer["target"]["simulated"])


def _last_names(modules: list[str]) -> str:
    return ", ".join(module.rpartition(".")[2] for module in modules)
