"""The outcome of a verification for the terminal."""

from typing import Any

from rich.table import Table

from maca_serve.verification.checks import FAIL, NOT_CHECKED, PASS

_STYLES = {PASS: "green", FAIL: "bold red", NOT_CHECKED: "yellow"}


def check_table(result: dict[str, Any]) -> Table:
    """One row for each check."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("held to", overflow="fold")
    for check in result["checks"]:
        status = check["status"]
        table.add_row(
            check["name"], f"[{_STYLES[status]}]{status}[/]", check["found"], check["limit"]
        )
    return table


def verdict(result: dict[str, Any]) -> str:
    """One line: how many checks passed, failed, and were not made; answers held to nothing."""
    counts = dict.fromkeys(_STYLES, 0)
    for check in result["checks"]:
        counts[check["status"]] += 1
    made = f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[NOT_CHECKED]} not checked"
    reasons = [check["found"] for check in result["checks"] if check["name"] == "agreement"]
    unproven = f"; its answers were compared with nothing: {reasons[0]}" if reasons else ""
    return f"{result['name']}: {made}{unproven}"
