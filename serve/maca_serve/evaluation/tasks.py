"""Multiple choice by log-probability: which continuation does the model find likeliest?"""

import math
import random
from collections.abc import Callable
from typing import Any

from maca_llmc.evaluation.questions import Question, grade, require_two
from maca_serve.engine.client import Client
from maca_serve.evaluation.corpus import Tokens

CONTINUATION = "continuation"
PASSAGE_TOKENS = 64
CHOICE_TOKENS = 16
CHOICES = 4


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
    require_two(len(places), f"{CONTINUATION}, of the evaluation text")
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
    sums = [
        [math.fsum(next(scored)[-len(choice) :]) for choice in question.choices]
        for question in questions
    ]
    found = grade(sums, questions)
    del found["acc_norm_right"]
    return found | {"questions": len(questions), "scores": found.pop("acc_right")}


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
