"""Multiple choice by log-probability: which continuation does the model find likeliest?"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.common.jsonl import read_rows
from maca_serve.common.stats import mean_and_error
from maca_serve.engine.client import Client
from maca_serve.evaluation.corpus import Tokens, special_tokens

CONTINUATION = "continuation"
PASSAGE_TOKENS = 64
CHOICE_TOKENS = 16
CHOICES = 4


@dataclass(frozen=True)
class Question:
    """One question as token ids.

    Attributes:
        context: what stands before each choice, special tokens included.
        choices: the continuations.
        sizes: bytes of each continuation's text, for length-normalised accuracy.
        answer: index of the right one.
    """

    context: list[int]
    choices: list[list[int]]
    sizes: list[int]
    answer: int

    @property
    def prompts(self) -> list[list[int]]:
        """One input for each choice."""
        return [self.context + choice for choice in self.choices]


def read_questions(path: Path, tokenizer: Any, limit: int, seed: int) -> list[Question]:
    """Read `question`, `choices`, `answer` (index) rows as `Question: ...\\nAnswer: choice`.

    Args:
        path: a JSON Lines file.
        tokenizer: a transformers tokenizer.
        limit: at most this many, drawn with `seed`, in file order.
        seed: of the draw.

    Raises:
        UserError: a broken row, named by its line, or fewer than two rows.
    """
    rows = [
        (f"{path}: line {number}", _check_row(path, number, row))
        for number, row in read_rows(path, ("question", "choices", "answer"))
    ]
    _require_two(len(rows), str(path))
    if len(rows) > limit:
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    prefix, _ = special_tokens(tokenizer)
    return [_encode(tokenizer, prefix, row, where) for where, row in rows]


def make_continuations(tokens: Tokens, tokenizer: Any, limit: int, seed: int) -> list[Question]:
    """The task `continuation`, which needs no data set: find the true next tokens of a passage.

    Each document is cut into consecutive pieces of a passage and what follows it. The wrong
    choices are what follows three other passages of the same document, so that topic and style
    do not give the answer away.

    Args:
        tokens: the evaluation text.
        tokenizer: to count the bytes of a choice.
        limit: at most this many, round-robin over documents.
        seed: of the wrong choices and of the right one's place.

    Raises:
        UserError: the text has too few documents of CHOICES pieces.
    """
    draw = random.Random(seed)
    documents = [_cut_pieces(document) for document in tokens.documents]
    documents = [pieces for pieces in documents if len(pieces) >= CHOICES]
    turns = max(map(len, documents), default=0)
    places = [(p, i) for i in range(turns) for p in documents if i < len(p)][:limit]
    _require_two(len(places), "the evaluation text, cut for the task `continuation`,")
    return [_choose_among(draw, pieces, i, tokens.prefix, tokenizer) for pieces, i in places]


def score_questions(
    client: Client, questions: list[Question], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Accuracy by summed log-probability, and by log-probability per byte of the choice.

    Args:
        client: of the running engine.
        questions: two or more.
        advance: called with the tokens of each finished request.

    Returns:
        {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "questions", "scores": 1 for each
        question that `acc` counts as right, else 0}.

    Raises:
        RequestError: the engine failed.
    """
    prompts = [prompt for question in questions for prompt in question.prompts]
    scored = iter(client.score(prompts, advance))
    right, right_normalised = [], []
    for question in questions:
        sums = [math.fsum(next(scored)[-len(choice) :]) for choice in question.choices]
        per_byte = [total / size for total, size in zip(sums, question.sizes, strict=True)]
        right.append(float(_best(sums) == question.answer))
        right_normalised.append(float(_best(per_byte) == question.answer))
    acc, error = mean_and_error(right)
    acc_norm, error_norm = mean_and_error(right_normalised)
    return {
        "acc": acc,
        "acc_stderr": error,
        "acc_norm": acc_norm,
        "acc_norm_stderr": error_norm,
        "questions": len(questions),
        "scores": right,
    }


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _require_two(count: int, where: str) -> None:
    if count < 2:
        raise UserError(f"{where} has {count} questions; a standard error needs at least 2")


def _check_row(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(row["question"], str):
        raise UserError(f"{path}: line {number}: 'question' is not a string")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{path}: line {number}: 'choices' is not a list of non-empty strings")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise UserError(f"{path}: line {number}: 'answer' is not an index")
    if len(choices) < 2 or not 0 <= answer < len(choices):
        raise UserError(
            f"{path}: line {number}: answer {answer} is not among its {len(choices)} choices"
        )
    return row


def _encode(tokenizer: Any, prefix: list[int], row: dict[str, Any], where: str) -> Question:
    """Split after encoding question and choice together: their border may change the tokens.

    Special tokens are put in front here: a tokenizer that also puts EOS behind would end the
    question with it.
    """

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    opening = f"Question: {row['question']}\nAnswer:"
    context = ids_of(opening)
    choices = [ids_of(f"{opening} {choice}")[len(context) :] for choice in row["choices"]]
    for choice, ids in zip(row["choices"], choices, strict=True):
        if not ids:
            raise UserError(f"{where}: the tokenizer has no token for the choice {choice!r}")
    sizes = [len(choice.encode()) for choice in row["choices"]]
    return Question(prefix + context, choices, sizes, row["answer"])


def _cut_pieces(document: list[int]) -> list[list[int]]:
    width = PASSAGE_TOKENS + CHOICE_TOKENS
    return [document[i : i + width] for i in range(0, len(document) - width + 1, width)]


def _choose_among(
    draw: random.Random, pieces: list[list[int]], index: int, prefix: list[int], tokenizer: Any
) -> Question:
    others = [piece for i, piece in enumerate(pieces) if i != index]
    answer = draw.randrange(CHOICES)
    chosen = draw.sample(others, CHOICES - 1)
    chosen.insert(answer, pieces[index])
    choices = [piece[PASSAGE_TOKENS:] for piece in chosen]
    sizes = [max(1, len(tokenizer.decode(choice).encode())) for choice in choices]
    return Question(prefix + pieces[index][:PASSAGE_TOKENS], choices, sizes, answer)
