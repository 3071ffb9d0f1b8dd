"""Questions are read from JSON Lines, and graded."""

import json

import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.questions import Question, grade, longest_prompt, read_questions

ROW = {"question": "who", "choices": ["a bee", "no"], "answer": 1, "source": "not of interest"}


def write(path, *rows):
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_prompt_is_the_question_and_a_choice(tmp_path):
    tokenizer = tiny_tokenizer()
    first, second = read_questions(write(tmp_path / "a.jsonl", ROW, ROW), tokenizer, 9)
    assert first == second and first.answer == 1 and first.sizes == [5, 2]
    for choice, text in zip(first.choices, ROW["choices"], strict=True):
        whole = tokenizer(f"Question: who\nAnswer: {text}")["input_ids"]
        assert [*first.context, *choice] == whole and whole in first.prompts
        assert choice and list(first.context) == tokenizer("Question: who\nAnswer:")["input_ids"]


def test_a_limit_draws_the_same_ones_in_file_order(tmp_path):
    rows = [{**ROW, "question": f"{'x' * i}"} for i in range(20)]
    path = write(tmp_path / "a.jsonl", *rows)
    tokenizer = tiny_tokenizer()
    every = read_questions(path, tokenizer, 20)
    drawn = read_questions(path, tokenizer, 6)
    places = [every.index(question) for question in drawn]
    assert len(places) == 6 and places == sorted(places) and places != list(range(6))
    assert read_questions(path, tokenizer, 6) == drawn
    assert read_questions(path, tokenizer, 6, seed=1) != drawn


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_separators_inside_a_string_are_no_ends_of_lines(tmp_path, separator):
    row = json.dumps({**ROW, "question": f"a{separator}b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{row}\r\n{row}\n", encoding="utf-8-sig")
    assert len(read_questions(tmp_path / "a.jsonl", tiny_tokenizer(), 9)) == 2


def test_a_tokenizer_that_ends_texts_with_eos_scores_whole_choices(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, ROW)
    plain, ending = tiny_tokenizer(), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert ending("a")["input_ids"][::2] == [1, 2]
    for one, other in zip(*(read_questions(path, t, 9) for t in (ending, plain)), strict=True):
        assert (one.context, one.choices) == ([1, *other.context], other.choices)


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.jsonl is not UTF-8 at byte 3"):
        read_questions(tmp_path / "a.jsonl", tiny_tokenizer(), 9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "\\ud83d"}', r"line 3: the row: Invalid JSON: .* hex escape"),
        ("{", "line 3: the row: Invalid JSON"),
        ({**ROW, "question": 3}, "line 3: question: Input should be a valid string"),
        ({"choices": ["a", "b"], "answer": 0}, "line 3: question: Field required"),
        ({**ROW, "choices": ["a"]}, "line 3: choices: List should have at least 2"),
        ({**ROW, "choices": ["a", ""]}, r"line 3: choices\.1: String should have at least 1"),
        ({**ROW, "answer": 2}, "answer 2 is not among 2 choices"),
        ({**ROW, "answer": "1"}, "line 3: answer: Input should be a valid integer"),
    ],
)
def test_rows_that_are_no_questions_are_named(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", ROW, row)
    with pytest.raises(UserError, match=message) as caught:
        read_questions(path, tiny_tokenizer(), 9)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_too_few_questions_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, ROW)
    with pytest.raises(UserError, match="1 questions give no standard error"):
        read_questions(path, tiny_tokenizer(), 1)


def test_a_choice_without_tokens_is_named(tmp_path):
    row = {**ROW, "choices": ["a", "b"]}
    path = write(tmp_path / "a.jsonl", row, row)

    def mute(text, **_):
        return {"input_ids": [1, 2, 3]}

    with pytest.raises(UserError, match="line 1: the tokenizer has no token for the choice 'a'"):
        read_questions(path, mute, 9)


def test_sum_and_per_byte_disagree_about_a_long_choice():
    questions = [Question([9], [[3], [1, 3]], [2, 8], 1), Question([9], [[5], [1]], [1, 1], 1)]
    found = grade([[-3, -4], [-5, -1]], questions)  # per byte: -3/2 and -4/8
    assert (found["acc"], found["acc_norm"]) == (0.5, 1.0)
    assert found["acc_stderr"] == pytest.approx(0.5) and found["acc_norm_stderr"] == 0.0
    assert found["acc_right"] == [0, 1] and longest_prompt(questions) == 3
