import json
import math

import pytest
from maca_serve.common.errors import UserError
from maca_serve.evaluation.corpus import Tokens, load_tokenizer
from maca_serve.evaluation.tasks import (
    Question,
    make_continuations,
    read_questions,
    score_questions,
)


class ToyClient:
    """Likes small token ids: log-probability is minus the id."""

    def score(self, prompts, advance):
        return [[-float(token) for token in prompt[1:]] for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_files):
    return load_tokenizer(tokenizer_files)


def rows_file(tmp_path, rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sum_and_per_byte_disagree_about_a_long_choice():
    # Sums: -3 and -4; per byte: -3/2 and -4/8.
    long_right = Question([9], [[3], [1, 3]], [2, 8], 1)
    both_right = Question([9], [[5], [1]], [1, 1], 1)
    found = score_questions(ToyClient(), [long_right, both_right], lambda tokens: None)
    assert found["acc"] == 0.5
    assert found["acc_norm"] == 1.0
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.5 * 0.5))
    assert found["acc_norm_stderr"] == 0.0
    assert found["questions"] == 2
    assert found["scores"] == [0.0, 1.0]


def test_only_the_choice_is_scored():
    # A context of large ids would drown the choices if it counted.
    questions = [Question([9, 500, 600], [[2], [1]], [1, 1], 1)] * 2
    assert score_questions(ToyClient(), questions, lambda tokens: None)["acc"] == 1.0


def test_questions_become_tokens(tmp_path, tokenizer):
    row = {"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 1}
    question, _ = read_questions(rows_file(tmp_path, [row, row]), tokenizer, 10, 0)
    assert tokenizer.decode(question.context).startswith("<s>")
    assert [tokenizer.decode(choice) for choice in question.choices] == ["w3", "w4 w5"]
    assert question.sizes == [2, 5]
    assert question.answer == 1
    assert question.prompts[0] == question.context + question.choices[0]


def test_limit_draws_the_same_rows_again(tmp_path, tokenizer):
    rows = [{"question": f"w{i}", "choices": ["w1", "w2"], "answer": 0} for i in range(50)]
    path = rows_file(tmp_path, rows)
    first, again = (read_questions(path, tokenizer, 5, 3) for _ in range(2))
    assert first == again
    assert len(first) == 5
    assert first != read_questions(path, tokenizer, 5, 4)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "choices": ["b", "c"]}, "line 2 has no column 'answer'; it has: choic"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "line 2: answer 2 is not among"),
        ({"question": "a", "choices": ["b", "c"], "answer": "0"}, "line 2: 'answer' is not an"),
        ({"question": "a", "choices": "bc", "answer": 0}, "line 2: 'choices' is not a list"),
        ({"question": 7, "choices": ["b", "c"], "answer": 0}, "line 2: 'question' is not a str"),
    ],
)
def test_wrong_rows_are_named(tmp_path, tokenizer, row, says):
    good = {"question": "a", "choices": ["b", "c"], "answer": 0}
    with pytest.raises(UserError, match=says):
        read_questions(rows_file(tmp_path, [good, row]), tokenizer, 10, 0)


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


def test_a_tokenizer_that_ends_texts_with_eos_scores_whole_choices(
    tmp_path, tokenizer, ending_tokenizer_files
):
    row = {"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 1}
    path = rows_file(tmp_path, [row, row])
    ending = load_tokenizer(ending_tokenizer_files)
    assert read_questions(path, ending, 10, 0) == read_questions(path, tokenizer, 10, 0)


def test_a_choice_without_tokens_is_named(tmp_path, tokenizer):
    row = {"question": "w1", "choices": ["w3", "  "], "answer": 0}
    with pytest.raises(UserError, match="line 1: the tokenizer has no token for the choice '  '"):
        read_questions(rows_file(tmp_path, [row, row]), tokenizer, 10, 0)
