"""Multiple choice by log-probability: which continuation does a model find likeliest?"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from maca_llmc.common.device import fast_linears
from maca_llmc.evaluation.questions import Question, grade


@torch.no_grad()
def score_questions(
    model: Any,
    questions: Sequence[Question],
    at_once: int,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Put questions to a model and grade its answers.

    :param at_once: tokens that go through the model together; prompts of one length do, so that
        nothing is padded
    :param advance: called with the tokens of every batch
    :return: as :func:`grade`
    """
    by_length = defaultdict(list)
    for index, question in enumerate(questions):
        for place, (prompt, choice) in enumerate(
            zip(question.prompts, question.choices, strict=True)
        ):
            by_length[len(prompt)].append((index, place, prompt, len(choice)))
    sums = [[0.0] * len(question.choices) for question in questions]
    for length, prompts in sorted(by_length.items()):
        step = max(1, at_once // length)
        for batch in (prompts[i : i + step] for i in range(0, len(prompts), step)):
            totals = _log_probabilities(model, batch)
            for (index, place, *_), total in zip(batch, totals, strict=True):
                sums[index][place] = total
            advance(length * len(batch))
    return grade(sums, questions)


def _log_probabilities(model: Any, batch: list[tuple[int, int, list[int], int]]) -> list:
    ids = torch.tensor([prompt for _, _, prompt, _ in batch], device=model.device)
    longest = max(size for *_, size in batch)
    with fast_linears(model.device):
        logits = model(ids, logits_to_keep=longest + 1).logits[:, :-1].float()
    targets = ids[:, -longest:]
    found = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return [float(row[-size:].sum()) for row, (*_, size) in zip(found, batch, strict=True)]
