"""Multiple-choice questions: read from a file, and graded by each choice's log-probability."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maca_llmc.common.errors import UserError
from maca_llmc.common.jsonl import read_lines
from maca_llmc.common.stats import mean_and_error
from maca_llmc.common.tokens import encode, special_tokens


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

    context: Sequence[int]
    choices: Sequence[Sequence[int]]
    sizes: Sequence[int]
    answer: int

    @property
    def prompts(self) -> list[list[int]]:
        """One input for each choice."""
        return [[*self.context, *choice] for choice in self.choices]


def read_questions(path: Path, tokenizer: Any, limit: int, seed: int = 0) -> list[Question]:
    r"""Read a JSON Lines file of ``question``, ``choices`` and ``answer`` (an index).

    A prompt is ``Question: ...\nAnswer: choice``.

    :param limit: at most this many, drawn with ``seed``, in file order
    :raises UserError: a row that is no question, by its line, or fewer than two rows
    """
    rows = [(where, _row(where, line)) for where, line in read_lines(path)]
    if len(rows) > limit:
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    require_two(len(rows), str(path))
    prefix, _ = special_tokens(tokenizer)
    return [_encode(tokenizer, prefix, row, where) for where, row in rows]


def require_two(count: int, where: str) -> None:
    """Refuse fewer questions than a standard error needs."""
    if count < 2:
        raise UserError(
            f"--tasks {where}: {count} questions give no standard error: give more, or a larger "
            "--limit"
        )


def prompt_tokens(questions: Sequence[Question]) -> int:
    """Tokens of all prompts."""
    return sum(len(prompt) for question in questions for prompt in question.prompts)


def longest_prompt(questions: Sequence[Question]) -> int:
    """Tokens of the longest prompt."""
    return max(len(prompt) for question in questions for prompt in question.prompts)


def grade(sums: Sequence[Sequence[float]], questions: Sequence[Question]) -> dict[str, Any]:
    """Accuracy by summed log-probability, and by log-probability per byte of the choice.

    :param sums: each choice's log-probability, a row for each question
    :return: ``acc`` and ``acc_norm``, each with its standard error, and for every question whether
        it was answered right (1) or not (0), for paired comparisons
    """
    by_byte = [
        [total / size for total, size in zip(found, question.sizes, strict=True)]
        for found, question in zip(sums, questions, strict=True)
    ]
    return {**_accuracy("acc", sums, questions), **_accuracy("acc_norm", by_byte, questions)}


def _accuracy(
    name: str, scores: Sequence[Sequence[float]], questions: Sequence[Question]
) -> dict[str, Any]:
    right = [
        int(max(range(len(found)), key=found.__getitem__) == question.answer)
        for found, question in zip(scores, questions, strict=True)
    ]
    share, error = mean_and_error(right)
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
    opening = f"Question: {row.question}\nAnswer:"
    context = encode(tokenizer, opening)
    choices = [encode(tokenizer, f"{opening} {choice}")[len(context) :] for choice in row.choices]
    for choice, ids in zip(row.choices, choices, strict=True):
        if not ids:
            raise UserError(
                f"--tasks {where}: the tokenizer has no token for the choice {choice!r}"
            )
    sizes = [len(choice.encode()) for choice in row.choices]
    return Question([*prefix, *context], choices, sizes, row.answer)
