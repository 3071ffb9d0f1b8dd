"""Multiple choice by log-probability: which continuation does a model find likeliest?

Questions are read and put to the model as ``maca-serve accuracy`` does it.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maca_llmc.common.device import fast_linears
from maca_llmc.common.errors import UserError
from maca_llmc.data.calibration import special_prefix
from maca_llmc.data.jsonl import read_lines


class Row(BaseModel):
    """One line of a file of questions; what else stands in it is of no interest here."""

    model_config = ConfigDict(strict=True)
    question: str
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    answer: int

    @model_validator(mode="after")
    def answer_is_a_choice(self) -> Self:
        """Hold the answer to the number of choices."""
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer} is not among {len(self.choices)} choices")
        return self


@dataclass(frozen=True)
class Question:
    """One question as token ids.

    :param context: what stands before each choice, special tokens included
    :param choices: the continuations
    :param sizes: bytes of each continuation's text, for length-normalised accuracy
    :param answer: index of the right one
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    answer: int


def read_questions(path: Path, tokenizer: Any, limit: int, seed: int = 0) -> list[Question]:
    r"""Read a JSON Lines file of ``question``, ``choices`` and ``answer`` (an index).

    A prompt is ``Question: ...\nAnswer: choice``.

    :param limit: at most this many, drawn with ``seed``, in file order
    :raises UserError: no such file, a row that is no question, by its line, fewer than two rows
    """
    if not path.is_file():
        raise UserError(
            f"--tasks {path}: no such file (built-in and lm-eval tasks are maca-serve accuracy's)"
        )
    rows = [(where, _row(where, line)) for where, line in read_lines(path)]
    if len(rows) > limit:
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    if len(rows) < 2:
        raise UserError(
            f"--tasks {path}: {len(rows)} questions give no standard error: give more, or a larger "
            "--limit"
        )
    prefix = special_prefix(tokenizer)
    return [_encode(tokenizer, prefix, row, where) for where, row in rows]


@torch.no_grad()
def score_questions(
    model: Any,
    questions: Sequence[Question],
    at_once: int,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Accuracy by summed log-probability, and by log-probability per byte of the choice.

    :param at_once: tokens that go through the model together; prompts of one length do, so that
        nothing is padded
    :param advance: called with the tokens of every batch
    :return: ``acc`` and ``acc_norm``, each with its standard error, and for every question whether
        it was answered right (1) or not (0), for paired comparisons
    """
    by_length = defaultdict(list)
    for index, question in enumerate(questions):
        for place, choice in enumerate(question.choices):
            prompt = (*question.context, *choice)
            by_length[len(prompt)].append((index, place, prompt, len(choice)))
    sums = [[0.0] * len(question.choices) for question in questions]
    for length, prompts in sorted(by_length.items()):
        step = max(1, at_once // length)
        for batch in (prompts[i : i + step] for i in range(0, len(prompts), step)):
            totals = _log_probabilities(model, batch)
            for (index, place, *_), total in zip(batch, totals, strict=True):
                sums[index][place] = total
            advance(length * len(batch))
    by_byte = [
        [total / size for total, size in zip(found, question.sizes, strict=True)]
        for found, question in zip(sums, questions, strict=True)
    ]
    return {**_accuracy("acc", sums, questions), **_accuracy("acc_norm", by_byte, questions)}


def prompt_tokens(questions: Sequence[Question]) -> int:
    """Tokens of all prompts."""
    return sum(len(q.context) + len(choice) for q in questions for choice in q.choices)


def _log_probabilities(model: Any, batch: list[tuple[int, int, tuple[int, ...], int]]) -> list:
    ids = torch.tensor([prompt for _, _, prompt, _ in batch], device=model.device)
    longest = max(size for *_, size in batch)
    with fast_linears(model.device):
        logits = model(ids, logits_to_keep=longest + 1).logits[:, :-1].float()
    targets = ids[:, -longest:]
    found = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return [float(row[-size:].sum()) for row, (*_, size) in zip(found, batch, strict=True)]


def _accuracy(
    name: str, scores: list[list[float]], questions: Sequence[Question]
) -> dict[str, Any]:
    right = [
        int(max(range(len(found)), key=found.__getitem__) == question.answer)
        for found, question in zip(scores, questions, strict=True)
    ]
    share = sum(right) / len(right)
    error = (share * (1 - share) / (len(right) - 1)) ** 0.5
    return {name: share, f"{name}_stderr": error, f"{name}_right": right}


def _row(where: str, line: str) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the row"
        wanted = "a row is a question, two or more choices, and answer, an index of them"
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--tasks {where}: {field}: {what}; {wanted}") from None


def _encode(tokenizer: Any, prefix: list[int], row: Row, where: str) -> Question:
    """Split after encoding question and choice together: their border may change the tokens.

    Special tokens are put in front here: a tokenizer that also puts EOS behind would end the
    question with it.
    """

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    opening = f"Question: {row.question}\nAnswer:"
    context = ids_of(opening)
    choices = [ids_of(f"{opening} {choice}")[len(context) :] for choice in row.choices]
    for choice, ids in zip(row.choices, choices, strict=True):
        if not ids:
            raise UserError(
                f"--tasks {where}: the tokenizer has no token for the choice {choice!r}"
            )
    return Question(
        (*prefix, *context),
        tuple(map(tuple, choices)),
        tuple(len(choice.encode()) for choice in row.choices),
        row.answer,
    )
