"""Multiple choice against log-probabilities summed by hand, one prompt at a time, in float64."""

import json

import pytest
import torch
from checkpoints import load
from tiny import save_tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.choices import Question, prompt_tokens, read_questions, score_questions


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


ROW = {"question": "who", "choices": ["a bee", "no"], "answer": 1, "source": "not of interest"}


def write(path, *rows):
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_prompts_are_those_of_the_serve_side(tmp_path):
    """``Question: ...``, ``Answer: choice``; its tests hold it to the same."""
    tokenizer = tiny_tokenizer()
    first, second = read_questions(write(tmp_path / "a.jsonl", ROW, ROW), tokenizer, 9)
    assert first == second and first.answer == 1 and first.sizes == (5, 2)
    for choice, text in zip(first.choices, ROW["choices"], strict=True):
        whole = tokenizer(f"Question: who\nAnswer: {text}")["input_ids"]
        assert [*first.context, *choice] == whole
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
        assert (one.context, one.choices) == ((1, *other.context), other.choices)


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
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "b.jsonl", tiny_tokenizer(), 9)
