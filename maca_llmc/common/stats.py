"""Means with their standard errors."""

import math
from collections.abc import Sequence


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of two or more values and its standard error, sqrt(s^2 / n) with the n-1 variance."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def perplexity(losses: Sequence[float]) -> dict[str, float]:
    """Perplexity of windows from each window's mean negative log-likelihood per token, in nats.

    The error of exp(m) follows by the delta method: exp(m) times the error of m.

    :return: ``ppl``, its ``stderr``, ``nll`` and ``nll_stderr``
    """
    nll, error = mean_and_error(losses)
    ppl = math.exp(nll)
    return {"ppl": ppl, "stderr": ppl * error, "nll": nll, "nll_stderr": error}
