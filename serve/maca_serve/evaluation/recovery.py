"""How much of the base a quantized checkpoint keeps, in percent, with bootstrap intervals.

Base and checkpoint saw the same windows, prompts and questions. The intervals are paired: a
resample draws windows, and takes what both checkpoints did with them. What makes a window hard for
both cancels.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 9999
BATCH = 500  # resamples at a time, for memory
SEED = 0

Array = NDArray[np.float64]
# Lowest and highest percent; None where a resample of the base scored 0, or nothing was paired.
Interval = list[float] | None


def recovery(base: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Recovery of one results entry, the base itself being 100.

    Perplexity is lower when better: its recovery is 100 * base / this, and so is that of a probe,
    of the perplexity of its answers. A task's is 100 * this / base of its headline metric, the
    other way round where lower is better. `mean` is the mean over lengths, or over tasks.

    Args:
        base: results of the base checkpoint.
        entry: results of this one, with the same lengths, tasks and probes.

    Returns:
        {"perplexity": {length: percent, "mean": percent}, "tasks": {name: percent, "mean": ...},
        "probes": {name: {length: percent, "mean": ...}}, "intervals": the same once more with
        [low, high] in place of percents}. None where that divides by 0, or cannot be known.
    """
    perplexity, intervals = _lengths(_losses(base["perplexity"]), _losses(entry["perplexity"]))
    tasks, task_intervals = _tasks(base["tasks"], entry["tasks"])
    probes = {
        name: _lengths(_probe_losses(base["probes"][name]), _probe_losses(by_length))
        for name, by_length in entry["probes"].items()
    }
    return {
        "perplexity": perplexity,
        "tasks": tasks,
        "probes": {name: percents for name, (percents, _) in probes.items()},
        "intervals": {
            "perplexity": intervals,
            "tasks": task_intervals,
            "probes": {name: found for name, (_, found) in probes.items()},
        },
    }


def headline(task: dict[str, Any]) -> tuple[float, float | None]:
    """A task's headline metric (`acc`, or what lm-eval's task reports) and its standard error."""
    metric = task.get("metric", "acc")
    return task[metric], task.get(f"{metric}_stderr")


def recovered(entry: dict[str, Any], *path: str) -> tuple[float | None, Interval]:
    """Percent and interval at a place of an entry's recovery, such as `perplexity`, `mean`."""
    percent, interval = entry["recovery"], entry["recovery"]["intervals"]
    for key in path:
        percent, interval = percent[key], interval[key]
    return percent, interval


def describe_intervals() -> dict[str, Any]:
    """How the intervals are made, for results."""
    return {
        "method": "paired percentile bootstrap",
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
    }


def _losses(by_length: dict[str, Any]) -> dict[str, list[float]]:
    return {length: values["losses"] for length, values in by_length.items()}


def _probe_losses(by_length: dict[str, Any]) -> dict[str, list[float]]:
    return {length: [-x for x in values["logprobs"]] for length, values in by_length.items()}


def _lengths(
    base: dict[str, list[float]], losses: dict[str, list[float]]
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Perplexities' recovery by length and in the mean.

    The windows of every length are the same ones, so one draw serves all lengths.
    """
    names = [*losses, "mean"]
    samples = [np.subtract(base[length], losses[length]) for length in losses]

    def kept(*gains: Array, axis: int) -> Array:
        # exp(mean loss of the base) / exp(mean loss of this)
        percents = [100.0 * np.exp(np.mean(gain, axis=axis)) for gain in gains]
        return np.stack([*percents, np.mean(percents, axis=0)])

    values = [float(value) for value in kept(*samples, axis=-1)]
    intervals = [_interval(found) for found in _resample(samples, kept)]
    return dict(zip(names, values, strict=True)), dict(zip(names, intervals, strict=True))


def _tasks(
    base: dict[str, Any], tasks: dict[str, Any]
) -> tuple[dict[str, float | None], dict[str, Interval]]:
    values = {name: _task_recovery(base[name], task) for name, task in tasks.items()}
    # Tasks have questions of their own: each is drawn by itself, and then they are averaged.
    drawn = {
        name: _resample_task(base[name], task, number)
        for number, (name, task) in enumerate(tasks.items())
    }
    known = [name for name, value in values.items() if value is not None]
    averaged = [found for name in known if (found := drawn[name]) is not None]
    complete = averaged and len(averaged) == len(known)
    mean = sum(values[name] or 0.0 for name in known) / len(known) if known else None
    intervals = {name: _interval(found) for name, found in drawn.items()}
    mean_interval = _interval(np.mean(averaged, axis=0)) if complete else None
    return {**values, "mean": mean}, {**intervals, "mean": mean_interval}


def _task_recovery(base: dict[str, Any], task: dict[str, Any]) -> float | None:
    above, below = _ordered(task, headline(task)[0], headline(base)[0])
    return 100.0 * above / below if below else None


def _resample_task(base: dict[str, Any], task: dict[str, Any], number: int) -> Array | None:
    """Recovery over resamples of the questions, None without a score for each question."""
    if "scores" not in task or len(task["scores"]) != len(base.get("scores", [])):
        return None

    def kept(above: Array, below: Array, axis: int) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100.0 * np.mean(above, axis=axis) / np.mean(below, axis=axis)

    pair = _ordered(task, np.asarray(task["scores"]), np.asarray(base["scores"]))
    return _resample(list(pair), kept, number)


def _ordered(task: dict[str, Any], this: Any, base: Any) -> tuple[Any, Any]:
    return (this, base) if task.get("higher_is_better", True) else (base, this)


def _resample(samples: list[Array], statistic: Callable[..., Array], number: int = 0) -> Array:
    """A statistic of paired samples over RESAMPLES draws, along the last axis."""
    with warnings.catch_warnings():
        # Resamples all alike, as of the base beside itself, have an interval without width here.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            samples,
            statistic,
            n_resamples=RESAMPLES,
            batch=BATCH,
            vectorized=True,
            paired=True,
            axis=-1,
            method="percentile",
            rng=np.random.default_rng([SEED, number]),
        )
    drawn: Array = found.bootstrap_distribution
    return drawn


def _interval(drawn: Array | None) -> Interval:
    if drawn is None or not np.isfinite(drawn).all():
        return None
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return [float(low), float(high)]
