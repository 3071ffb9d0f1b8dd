"""A plan as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.filesize import decimal as size
from rich.table import Table
from rich.text import Text

from maca_llmc.common.record import describe_lengths


def print_plan(plan: dict[str, Any]) -> None:
    """Print what :func:`maca_llmc.plan` found."""
    console = Console()
    console.print(_modules(plan))
    console.print(_costs(plan))
    console.print(_kernels(plan))


def _modules(plan: dict[str, Any]) -> Table:
    table = Table(title="what is quantized, and what is not")
    for column in ("modules", "parameters"):
        table.add_column(column, justify="right")
    table.add_column("scheme, or why not")
    for entry in plan["modules"]:
        table.add_row(str(entry["modules"]), _count(entry["parameters"]), entry["scheme"])
    for entry in plan["unquantized"]:
        why = f"not: {entry['why']} (first: {entry['first']})"
        table.add_row(str(entry["modules"]), _count(entry["parameters"]), why)
    for name, tensors in plan["dropped"].items():
        table.add_row("", "", f"left out: draft layers {name} ({tensors} tensors)")
    return table


def _costs(plan: dict[str, Any]) -> Table:
    table = Table(title="what it takes (estimates)", show_header=False)
    memory = plan["memory"]
    calibration, hessians = plan["calibration"], plan["hessians"]
    lengths = describe_lengths(calibration)
    table.add_row("calibration", f"{calibration['tokens']} tokens ({lengths})")
    table.add_row("Hessians", f"{hessians['distinct']} for {hessians['modules']} modules")
    table.add_row("peak host memory", size(memory["host"]))
    if memory["device"]:
        table.add_row("peak device memory", size(memory["device"]))
    table.add_row("  weights", size(memory["weights"]))
    table.add_row("  hidden states", size(memory["hidden_states"]))
    if memory["spilled"]:
        table.add_row("  of them on disk", size(memory["spilled"]))
    table.add_row("  one layer's Hessians and solve", size(memory["one_layer"]))
    table.add_row("finished layers on disk, until the end", size(plan["state_bytes"]))
    table.add_row("checkpoint", size(plan["checkpoint_bytes"]))
    return table


def _kernels(plan: dict[str, Any]) -> Table:
    table = Table(title="vLLM's kernel for the result")
    table.add_column("where")
    table.add_column("kernel (layers)", overflow="fold")
    for entry in plan["kernels"]:
        if "unknown" in entry:
            table.add_row(entry["target"], Text(f"unknown: {entry['unknown']}"))
            continue
        kernels = ", ".join(f"{name} ({count})" for name, count in entry["kernels"].items())
        verdict = "" if entry["verdict"] == "loads" else f"; {entry['verdict']}"
        helpful = [
            f"would help: {change['change']}: {', '.join(change['kernels']) or 'with the package'}"
            for change in entry["changes"]
        ]
        words = "\n".join([kernels + verdict, *entry["remarks"], *helpful])
        table.add_row(entry["target"], Text(words))  # vLLM's brackets are no markup
    return table


def _count(number: int) -> str:
    return f"{number / 1e6:.4g} M"
