"""Multiple choice against log-probabilities summed by hand, one prompt at a time, in float64."""

import pytest
import torch
from checkpoints import load
from tiny import save_tiny_model

from maca_llmc.evaluation.choices import score_questions
from maca_llmc.evaluation.questions import Question, prompt_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = {"num_hidden_layers": 1, "initializer_range": 0.3}
    return load(save_tiny_model("llama", tmp_path_factory.mktemp("base"), **shape)).double()


def some_questions(count=24):
    """Of several lengths, choices too, so that batches of one length mix questions."""
    draw = torch.Generator().manual_seed(3)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(5, 60, (size,), generator=draw).tolist())

    return [
        Question(
            ids(3, 9),
            tuple(ids(1, 6) for _ in range(2 + i % 3)),
            tuple(3 + 4 * j for j in range(2 + i % 3)),
            i % 2,
        )
        for i in range(count)
    ]


@torch.no_grad()
def by_hand(model, question, per_byte):
    totals = []
    for choice, size in zip(question.choices, question.sizes, strict=True):
        ids = [*question.context, *choice]
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = sum(float(logs[i - 1, ids[i]]) for i in range(len(question.context), len(ids)))
        totals.append(total / size if per_byte else total)
    return int(totals.index(max(totals)) == question.answer)


@pytest.mark.parametrize("at_once", [1, 64, 4096])
def test_against_log_probabilities_by_hand(model, at_once):
    questions = some_questions()
    tokens = []
    found = score_questions(model, questions, at_once, tokens.append)
    assert found["acc_right"] == [by_hand(model, q, False) for q in questions]
    assert found["acc_norm_right"] == [by_hand(model, q, True) for q in questions]
    assert found["acc_right"] != found["acc_norm_right"], "the sizes must matter here"
    assert found["acc"] == pytest.approx(sum(found["acc_right"]) / 24)
    right = torch.tensor(found["acc_right"], dtype=torch.float64)
    assert found["acc_stderr"] == pytest.approx(float(right.std()) / 24**0.5)
    assert sum(tokens) == prompt_tokens(questions)
