"""What vLLM's answers mean: does it load, what falls back, what to change."""

import re
from dataclasses import replace
from typing import Any

from maca_serve.common.machine import describe_machine
from maca_serve.doctor.checks import Contents, Problem, heads_misfit
from maca_serve.doctor.layer_problems import CHANGES, layer_problems
from maca_serve.doctor.loadable import loading_problems
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.doctor.traps import wants_positive

Entry = dict[str, Any]
LOADS, CONDITIONAL, FAILS, UNKNOWN = "loads", "conditional", "does not load", "unknown"
_FOR_LAYER = re.compile(r" for layer '[^']*'")
_NUMBER = re.compile(r"\b\d+\b")
_LOOK = ("class", "experts", "shape", "partition", "quantized", "scheme", "kernel", "error")


def describe(
    subject: str, scheme: str, config: dict[str, Any], contents: Contents, answer: Entry
) -> Entry:
    """Everything the doctor found, as JSON.

    Returns:
        `subject`, `scheme`, `vllm`; `target` (name, capability, simulated, compiled_code_assumed,
        tensor_parallel, dtype); `verdict` (`loads`, `conditional` on an optional package, `does
        not load`, or `unknown` where nobody was asked); `problems` (severity `error`, `warning` or
        `note`; what, cure, count, up to three modules); `attention` (backend, head_size, sizes that
        it has, refused), null where it was not asked: on behalf of another card, or for want of
        plain attention or of a config that vLLM reads; `layers`, one entry for all layers of one
        look: layer, count, class, parts, experts (how many in a layer of experts, else null),
        shape and partition as [output, input] features (of experts those of one's gate and up),
        scheme, kernel, backend (vLLM's name for the kernel of experts, else null), refused
        [{kernel, reason, needs}], with_packages {kernel, needs, install} or null, falls_back_from,
        error; and `changes` that would help, [{change, kernels}].
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
        problems += layer_problems(entry, config, answer, here)
    problems += _stored_otherwise(layers, contents)
    problems += _unlike(layers, config)
    problems += _signed(layers, contents, config)
    problems += _loading(answer, contents, problems)
    problems += _experts(answer)
    problems += _attention(answer)
    problems = _merge(problems)
    changes = _helpful(layers, answer.get("variants", []))
    for problem in problems:
        if problem.cure == CHANGES and not changes:
            problem.cure = "choose another scheme or target: no change that was tried helps"
    return {
        "subject": subject,
        "scheme": scheme,
        "vllm": answer["vllm"],
        "target": {**answer.get("target", {}), "dtype": answer.get("dtype")},
        "verdict": _verdict(problems, layers, answer),
        "problems": [problem.describe() for problem in problems],
        "attention": answer.get("attention"),
        "layers": _group(layers),
        "changes": changes,
    }


def _complete(entry: Entry) -> Entry:
    if entry["error"]:
        # vLLM names the layer; the same error in another layer is the same error.
        error = _FOR_LAYER.sub("", entry["error"])
        alike = error.replace(entry["layer"], _NUMBER.sub("*", entry["layer"]))
        entry = {**entry, "error": alike}
    # A method that asks no list of kernels runs code of its own, named like the method.
    if entry["quantized"] and entry["kernel"] is None and not entry["error"]:
        entry = {**entry, "kernel": entry["scheme"], "own_code": True}
    roomy = entry.get("roomy_kernel")
    fell = roomy if entry["kernel"] and roomy not in (None, entry["kernel"]) else None
    return {**entry, "falls_back_from": fell, "with_packages": entry.get("with_packages")}


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
            if entry["class"] == "ParallelLMHead" and all(stored):
                what = "vLLM takes an output head for quantized only where a target names it"
                last = entry["layer"].rpartition(".")[2]
                cure = f"add 're:.*{last}$' to the targets of its group"
            problems.append(Problem("error", what, cure, [entry["layer"]]))
    return problems


def _unlike(layers: list[Entry], config: dict[str, Any]) -> list[Problem]:
    """vLLM takes the scheme of the first part for all of them."""
    find = scheme_finder(config["quantization_config"])
    problems: list[Problem] = []
    if find is None:
        return problems
    for entry in layers:
        schemes = [scheme for part in entry["parts"] if (scheme := find(part)) is not None]
        if len({replace(scheme, actorder=None) for scheme in schemes}) > 1:
            last = entry["layer"].rpartition(".")[2]
            what = f"{last} fuses modules of unlike schemes, and vLLM reads all as the first"
            cure = f"quantize {_last_names(entry['parts'])} alike"
            problems.append(Problem("error", what, cure, entry["parts"]))
    return problems


def _signed(layers: list[Entry], contents: Contents, config: dict[str, Any]) -> list[Problem]:
    find = scheme_finder(config["quantization_config"])
    problems: list[Problem] = []
    for entry in layers:
        signed = [part for part in entry["parts"] if part in contents.signed]
        scheme = find(signed[0]) if find and signed else None
        if scheme and entry["kernel"] and (trap := wants_positive(entry["kernel"], scheme, signed)):
            problems.append(trap)
    return problems


def _loading(answer: Entry, contents: Contents, known: list[Problem]) -> list[Problem]:
    """What vLLM's loader said, but for what other findings say better."""
    found = answer.get("loading")
    errors = [problem for problem in known if problem.severity == "error"]
    if not found or (found["unasked"] and errors):
        return []
    if found["unasked"]:
        severity = "warning" if _simulated(answer) else "error"
        what = f"vLLM's model cannot be built here, so no tensor was tried: {found['unasked']}"
        return [Problem(severity, what, "ask in an environment in which vLLM can serve it")]
    explained = {module for problem in errors for module in problem.modules}
    problems = list(loading_problems(found, contents.quantized, explained))
    if found["attention"] and not _simulated(answer):
        what = f"vLLM's attention cannot run it here: {found['attention']}"
        problems.append(Problem("error", what, "serve it on another kind of device"))
    return problems


def _experts(answer: Entry) -> list[Problem]:
    what = "experts run in vLLM's fused mixture-of-experts kernels, which were not asked: "
    unasked = answer.get("unasked_experts", [])
    return [Problem("warning", what + x["reason"], "", x["modules"]) for x in unasked]


def _attention(answer: Entry) -> list[Problem]:
    """vLLM's CPU engine would find out at the first request."""
    found = answer.get("attention")
    if not found or not found["refused"]:
        return []
    backend = f"vLLM's {found['backend']}" if found["backend"] else "vLLM's attention"
    sizes = ", ".join(map(str, found["sizes"]))
    what = f"{backend} cannot run attention heads of {found['head_size']}: {found['refused']}"
    cure = "serve it on another kind of device" + (f": {backend} has {sizes}" if sizes else "")
    return [Problem("error", what, cure)]


def _verdict(problems: list[Problem], layers: list[Entry], answer: Entry) -> str:
    if any(problem.severity == "error" for problem in problems):
        return FAILS
    quantized = [entry for entry in layers if entry["quantized"]]
    if not quantized or answer.get("unasked_experts"):
        return UNKNOWN
    return LOADS if all(entry["kernel"] for entry in quantized) else CONDITIONAL


def _merge(problems: list[Problem]) -> list[Problem]:
    """Each problem once, with all its modules; errors first."""
    merged: dict[tuple[str, str, str], Problem] = {}
    for problem in problems:
        key = (problem.severity, problem.what, problem.cure)
        same = merged.setdefault(key, Problem(*key))
        same.modules += [
            name for name in dict.fromkeys(problem.modules) if name not in same.modules
        ]
    order = ("error", "warning", "note")
    return sorted(merged.values(), key=lambda problem: order.index(problem.severity))


def _group(layers: list[Entry]) -> list[Entry]:
    """One entry for all layers of one look, with how many there are."""
    groups: dict[str, Entry] = {}
    for entry in layers:
        name = _NUMBER.sub("*", entry["layer"])
        look = repr([name, *(entry[key] for key in _LOOK), entry["refusals"]])
        parts = list(dict.fromkeys(_NUMBER.sub("*", part) for part in entry["parts"]))
        shown = {key: entry[key] for key in _LOOK}
        group = {"layer": name, "count": 0, "parts": parts, **shown}
        group |= {"refused": entry["refusals"], "with_packages": entry["with_packages"]}
        group["backend"] = entry.get("backend")
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


def _simulated(answer: Entry) -> bool:
    return bool(answer["target"]["simulated"])


def _last_names(modules: list[str]) -> str:
    names = (module.rpartition(".")[2] for module in modules)
    return ", ".join(dict.fromkeys(names))
