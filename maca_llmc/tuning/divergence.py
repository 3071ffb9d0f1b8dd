"""KL divergence from a base's answers to a model's logits, and its gradient.

The base's answers are its ``k`` largest probabilities and one bucket for the rest. Merging outcomes
can only lower a KL divergence, so this is a lower bound.
"""

from dataclasses import dataclass
from typing import Any

import torch

ROWS = 256
"""Tokens whose vocabulary is in float32 at a time."""


@dataclass(frozen=True)
class Answers:
    """What the base answers at some tokens.

    :param ids: int32 ``[tokens, k]``
    :param logs: log-probabilities, ``[tokens, k]``
    """

    ids: torch.Tensor
    logs: torch.Tensor

    def __getitem__(self, rows: slice) -> "Answers":
        return Answers(self.ids[rows], self.logs[rows])


def top_answers(logits: torch.Tensor, k: int) -> Answers:
    """The ``k`` likeliest answers at each token.

    :param logits: ``[tokens, vocabulary]``
    """
    ids, logs = [], []
    for rows in logits.split(ROWS):
        values, best = rows.float().log_softmax(-1).topk(k)
        ids.append(best.int())
        logs.append(values)
    return Answers(torch.cat(ids), torch.cat(logs))


def divergence(logits: torch.Tensor, answers: Answers) -> torch.Tensor:
    """KL(base || model) in nats at each token, ``[tokens]``, without a gradient."""
    chunks = [
        _divergence(logits[i : i + ROWS], answers[i : i + ROWS])[0]
        for i in range(0, len(logits), ROWS)
    ]
    return torch.cat(chunks)


class WeightedDivergence(torch.autograd.Function):
    """``sum_t w_t KL_t``; the gradient of logits is kept in their dtype, rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, answers: Answers, weights: torch.Tensor) -> Any:
        """:param logits: ``[tokens, vocabulary]``; ``weights`` ``[tokens]``."""
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        for i in range(0, len(logits), ROWS):
            rows = slice(i, i + ROWS)
            kl, of_logits = _divergence(logits[rows], answers[rows], gradient=True)
            total += (weights[rows] * kl).sum()
            gradient[rows] = of_logits * weights[rows, None]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The kept gradient times the outer one."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


def _divergence(
    logits: torch.Tensor, answers: Answers, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL at each token and, if asked for, what it gives the logits.

    With p and q the base's and the model's probabilities, r the rest: ``q_j - p_j`` for the k
    answers kept and ``q_j (1 - p_r / q_r)`` for all others.
    """
    ids = answers.ids.long()
    logs = logits.float().log_softmax(-1)
    p = answers.logs.float().exp()
    q_log = logs.gather(1, ids)
    p_rest = (1 - p.sum(-1)).clamp_min(1e-9)
    q_rest = (1 - q_log.exp().sum(-1)).clamp_min(1e-9)
    kl = (p * (answers.logs.float() - q_log)).sum(-1) + p_rest * (p_rest / q_rest).log()
    if not gradient:
        return kl, logs
    q = logs.exp_()
    of_logits = q * (1 - p_rest / q_rest).unsqueeze(-1)
    return kl, of_logits.scatter_(1, ids, q.gather(1, ids) - p)
