"""How much of the base a quantized checkpoint keeps, in percent."""

from typing import Any


def recovery(base: dict[str, Any], entry: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Recovery of one results entry, the base itself being 100.

    Perplexity is lower when better: its recovery is 100 * base / this. A task's is
    100 * this / base of its headline metric, the other way round where lower is better.
    `mean` is the mean over lengths, or over tasks.

    Args:
        base: results of the base checkpoint.
        entry: results of this one, with the same lengths and tasks.

    Returns:
        {"perplexity": {length: percent, "mean": percent}, "tasks": {name: percent, "mean": ...}};
        None where that divides by 0, and for the mean of nothing.
    """
    perplexity: dict[str, float | None] = {
        length: 100.0 * base["perplexity"][length]["ppl"] / values["ppl"]
        for length, values in entry["perplexity"].items()
    }
    tasks = {
        name: _task_recovery(base["tasks"][name], values) for name, values in entry["tasks"].items()
    }
    return {"perplexity": _with_mean(perplexity), "tasks": _with_mean(tasks)}


def headline(task: dict[str, Any]) -> tuple[float, float | None]:
    """A task's headline metric (`acc`, or what lm-eval's task reports) and its standard error."""
    metric = task.get("metric", "acc")
    return task[metric], task.get(f"{metric}_stderr")


def _task_recovery(base: dict[str, Any], task: dict[str, Any]) -> float | None:
    above, below = headline(task)[0], headline(base)[0]
    if not task.get("higher_is_better", True):
        above, below = below, above
    return 100.0 * above / below if below else None


def _with_mean(values: dict[str, float | None]) -> dict[str, float | None]:
    known = [value for value in values.values() if value is not None]
    return {**values, "mean": sum(known) / len(known) if known else None}
