import pytest
from maca_serve.evaluation.corpus import Tokens, load_tokenizer
from maca_serve.evaluation.tasks import make_continuations, score_questions

from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.questions import Question


class ToyClient:
    """Likes small token ids: log-probability is minus the id."""

    def score(self, prompts, advance):
        return [[-float(token) for token in prompt[1:]] for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_files):
    return load_tokenizer(tokenizer_files)


def test_only_the_choice_is_scored():
    # A context of large ids would drown the choices if it counted.
    questions = [Question([9, 500, 600], [[2], [1]], [1, 1], 1)] * 2
    assert score_questions(ToyClient(), questions, lambda tokens: None)["acc"] == 1.0


def test_continuations_are_true_text_of_one_document(tokenizer):
    documents = [list(range(2, 162)) * 3, list(range(5, 130)) * 4, list(range(2, 50))]
    tokens = Tokens([1], documents)
    questions = make_continuations(tokens, tokenizer, 8, 0)
    assert questions == make_continuations(tokens, tokenizer, 8, 0)
    assert questions != make_continuations(tokens, tokenizer, 8, 1)
    assert len(questions) == 8
    for number, question in enumerate(questions):
        document = documents[number % 2]
        start = 80 * (number // 2)
        assert question.context == [1, *document[start : start + 64]]
        assert question.choices[question.answer] == document[start + 64 : start + 80]
        ends = [document[i + 64 : i + 80] for i in range(0, len(document) - 79, 80)]
        assert all(choice in ends for choice in question.choices)
        assert len(question.choices) == 4
    assert len({question.answer for question in questions}) > 1


def test_text_without_room_for_wrong_choices(tokenizer):
    with pytest.raises(UserError, match="0 questions"):
        make_continuations(Tokens([], [list(range(300))]), tokenizer, 8, 0)
