"""The doctor's answer for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from maca_serve.doctor.findings import CONDITIONAL, FAILS, LOADS
from maca_serve.doctor.layer_problems import packages_in_words

_SAYS = {
    LOADS: "vLLM would load it.",
    CONDITIONAL: "vLLM would load it with the packages named below.",
    FAILS: "vLLM would not load it, or not compute what it should.",
}
_MARKS = {"error": "ERROR", "warning": "warning", "note": "note"}


def lines(diagnosis: dict[str, Any]) -> Iterator[str]:
    """What stands above the table."""
    target = diagnosis["target"]
    yield f"{diagnosis['subject']}: {diagnosis['scheme']}"
    yield f"target: {_target(diagnosis)}"
    if target.get("compiled_code_assumed"):
        yield "        no such card here: vLLM's Python is asked, its compiled CUDA code is assumed"
    yield _SAYS.get(diagnosis["verdict"], "Not every layer could be asked for.")


def layer_table(diagnosis: dict[str, Any]) -> Table:
    """One row for each look of quantized layer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "count", "out x in", "kernel"):
        justify: Any = "right" if column == "count" else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column == "layer")
    for layer in diagnosis["layers"]:
        if layer["quantized"]:
            table.add_row(
                layer["layer"].removeprefix("model."),
                str(layer["count"]),
                _size(layer),
                _kernel(layer),
            )
    return table


def endings(diagnosis: dict[str, Any]) -> Iterator[str]:
    """What stands below the table: refused kernels, problems, changes that would help."""
    yield from _refusals(diagnosis["layers"])
    for problem in diagnosis["problems"]:
        yield f"{_MARKS[problem['severity']]}: {problem['what']}{_where(problem)}"
        if problem["cure"]:
            yield f"    -> {problem['cure']}"
    if diagnosis["changes"]:
        yield "what would help, as vLLM answers:"
    for change in diagnosis["changes"]:
        kernels = ", ".join(_short(kernel) for kernel in change["kernels"])
        yield f"    {change['change']}: {kernels or 'with the package'}"


def in_one_line(problem: dict[str, Any]) -> str:
    """A problem of a diagnosis with its cure."""
    cure = f": {problem['cure']}" if problem["cure"] else ""
    return f"{problem['what']}{_where(problem)}{cure}"


def _where(problem: dict[str, Any]) -> str:
    if not problem["modules"]:
        return ""
    return f" ({problem['modules'][0]}{_more(problem['count'])})"


def _refusals(layers: list[dict[str, Any]]) -> Iterator[str]:
    """Why vLLM passes over kernels, each reason once with the layers it holds for."""
    quantized = [layer for layer in layers if layer["quantized"]]
    reasons: dict[str, list[str]] = {}
    for layer in quantized:
        for refusal in layer["refused"]:
            text = f"{_short(refusal['kernel'])}: {_because(refusal)}"
            reasons.setdefault(text, []).append(layer["layer"].rpartition(".")[2])
    if reasons:
        yield "passed over:"
    for text, names in reasons.items():
        everywhere = len(names) == len(quantized)
        yield f"    {text}" + ("" if everywhere else f" ({', '.join(dict.fromkeys(names))})")


def _target(diagnosis: dict[str, Any]) -> str:
    target = diagnosis["target"]
    name = target.get("name", "this machine")
    ranks = target.get("tensor_parallel", 1)
    parts = [name, f"{ranks} ranks" if ranks > 1 else "", str(target.get("dtype") or "")]
    return f"{', '.join(part for part in parts if part)} (vLLM {diagnosis['vllm']})"


def _size(layer: dict[str, Any]) -> str:
    whole, part = layer["shape"], layer["partition"]
    text = f"{whole[0]} x {whole[1]}"
    if layer["experts"]:
        text = f"{layer['experts']} experts of {text}"
    return text if part in (None, whole) else f"{text} -> {part[0]} x {part[1]}"


def _kernel(layer: dict[str, Any]) -> str:
    name = _short(layer["kernel"]) if layer["kernel"] else "none"
    offer = layer["with_packages"]
    if offer is None:
        return name
    return f"{name}; with {packages_in_words(offer['needs'])}: {_short(offer['kernel'])}"


def _because(refusal: dict[str, Any]) -> str:
    if refusal["needs"]:
        return f"needs {packages_in_words(refusal['needs'])}"
    return str(refusal["reason"])


def _short(kernel: str) -> str:
    return kernel.removesuffix("Kernel").removesuffix("Linear").removesuffix("ScaledMM")


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
