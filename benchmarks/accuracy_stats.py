"""What the cells of the accuracy grid say: paired, over seeds, windows and questions."""

import statistics
from collections.abc import Sequence

import numpy as np
from accuracy_arms import LENGTHS, identity
from scipy import stats

RESAMPLES = 10_000
BY_BYTE = {"arc_easy", "openbookqa", "piqa"}
"""Tasks whose choices differ in length, where accuracy is by log-probability per byte."""

Cells = dict[str, dict[int, dict]]
"""By method and seed, of one model and scheme."""


def kl(cell: dict, length: int) -> float:
    """KL divergence to the base, nats per token."""
    return cell["kl"][str(length)]["mean"]


def mean_log_kl(cell: dict) -> float:
    """Mean over lengths of the logarithm: a ratio counts the same wherever it is."""
    return statistics.fmean(float(np.log(kl(cell, length))) for length in LENGTHS)


def shared_seeds(cells: Cells, *methods: str) -> list[int]:
    """Seeds that all of these methods have."""
    return sorted(set.intersection(*(set(cells.get(method, {})) for method in methods)))


def pairs_at(cells: Cells, one: str, other: str, length: int) -> list[tuple[float, float]]:
    """KL of two methods by shared seed."""
    return [
        (kl(cells[one][seed], length), kl(cells[other][seed], length))
        for seed in shared_seeds(cells, one, other)
    ]


def ratio_of_means(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean of the first over mean of the second."""
    return statistics.fmean(a for a, _ in pairs) / statistics.fmean(b for _, b in pairs)


def holm(values: list[float | None]) -> list[float | None]:
    """p values corrected for how many were looked at (Holm, 1979)."""
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i])
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def changes(cells: Cells, one: str, other: str) -> list[float]:
    """How the logarithm of KL changes from one method to another, by shared seed."""
    return [
        mean_log_kl(cells[other][seed]) - mean_log_kl(cells[one][seed])
        for seed in shared_seeds(cells, one, other)
    ]


def repeats(runs: list[dict]) -> list[list[float]]:
    """For each cell that was run again: KL of its last run over that of its first, by length."""
    first: dict[tuple, dict] = {}
    last: dict[tuple, dict] = {}
    for run in runs:
        first.setdefault(identity(run), run)
        last[identity(run)] = run
    return [
        [kl(last[key], length) / kl(first[key], length) for length in LENGTHS]
        for key in first
        if last[key] is not first[key]
    ]


def p_over_groups(by_group: list[list[float]]) -> float | None:
    """p of a t test whether changes are none; None for fewer than two models and schemes.

    Seeds of one model and scheme share its weights and windows, so that they count once, as their
    mean.
    """
    means = [statistics.fmean(group) for group in by_group]
    return float(stats.ttest_1samp(means, 0.0).pvalue) if len(means) > 1 else None


def paired_p(pairs: list[tuple[float, float]]) -> float | None:
    """p of a paired t test; None for fewer than two pairs."""
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue) if len(pairs) > 1 else None


def window_interval(one: list[dict], other: list[dict], length: int) -> tuple[float, float]:
    """95 % bootstrap interval over windows of the ratio of two methods' KL, seeds averaged."""
    means = [
        np.mean([cell["kl"][str(length)]["windows"] for cell in cells], axis=0)
        for cells in (one, other)
    ]
    picks = np.random.default_rng(0).integers(len(means[0]), size=(RESAMPLES, len(means[0])))
    ratios = means[0][picks].mean(1) / means[1][picks].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def right(tasks: dict, name: str) -> np.ndarray:
    """1 for every question of a task that was answered right, else 0."""
    key = "acc_norm_right" if name in BY_BYTE else "acc_right"
    return np.array(tasks[name][key], dtype=float)


def mean_and_error(by_task: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean over tasks of each one's mean over questions, and its standard error, in points."""
    mean = np.mean([values.mean() for values in by_task])
    variance = sum(values.var(ddof=1) / len(values) for values in by_task) / len(by_task) ** 2
    return float(100 * mean), float(100 * variance**0.5)


def zero_shot(cells: Sequence[dict], left_out: Sequence[str] = ()) -> list[np.ndarray]:
    """Of each task, every question's share of right answers over the seeds."""
    names = [name for name in cells[0]["tasks"] if name not in left_out]
    return [np.mean([right(cell["tasks"], name) for cell in cells], axis=0) for name in names]
