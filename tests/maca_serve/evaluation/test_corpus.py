import json

import pytest
from maca_serve.common.errors import UserError
from maca_serve.evaluation.corpus import Tokens, load_tokenizer, read_corpus, tokenize

from maca_llmc.common.defaults import EVALUATION_SAMPLE


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert read_corpus(path).documents == ["one\n\ntwo\n"]


def test_jsonl_documents_keep_their_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "b"}\n\n{"text": "a", "source": "x"}\n{"text": "  "}\n')
    assert read_corpus(path).documents == ["b", "a"]


def test_own_text_is_shipped():
    corpus = read_corpus()
    assert corpus.path == EVALUATION_SAMPLE
    assert len(corpus.sha256) == 64
    assert sum(map(len, corpus.documents)) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', "line 1 has no column 'text'; it has: body, id"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", '{"text": 3}\n', "line 1: 'text' is not a string"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", " \n", "holds no text"),
        ("a.csv", "x", "must be .txt or .jsonl"),
        ("a.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("a.jsonl", b"\xff\xfe\xff", "not UTF-8"),
        ("a.jsonl", '{"text": "y\\ud83d"}\n', "line 1 holds .ud83d, half of a"),
        ("a.jsonl", "[" * 100_000, "line 1 cannot be read as JSON"),
        ("a.jsonl", '{"text": %s}' % ("9" * 5000), "line 1 cannot be read as JSON"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says):
        read_corpus(path)


def test_missing_text(tmp_path):
    with pytest.raises(UserError, match="no such text file"):
        read_corpus(tmp_path / "nope.txt")


def test_documents_are_encoded_alone_and_the_prefix_apart(tokenizer_files, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w0 w1"}\n{"text": "w2"}\n')
    tokens = tokenize(load_tokenizer(tokenizer_files), read_corpus(path))
    assert tokens.prefix == [1]
    assert tokens.documents == [[2, 3], [4]]


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001e"])
def test_separators_inside_a_string_are_no_ends_of_lines(tmp_path, separator):
    path = tmp_path / "a.jsonl"
    text = f"one{separator}two"
    escape = separator < " "  # JSON wants control characters escaped
    row = json.dumps({"text": text}, ensure_ascii=escape)
    path.write_text(f"{row}\r\n{row}\n", encoding="utf-8")
    assert read_corpus(path).documents == [text, text]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '{"text": "x"}'), ("a.txt", "x")])
def test_a_byte_order_mark_is_not_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_corpus(tmp_path / name).documents == ["x"]


def test_eos_behind_a_text_is_not_part_of_its_prefix(ending_tokenizer_files, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w0 w1")
    tokenizer = load_tokenizer(ending_tokenizer_files)
    assert len(tokenizer("w0")["input_ids"]) == 3
    assert tokenize(tokenizer, read_corpus(path)) == Tokens([1], [[2, 3]])


def test_a_text_that_has_its_prefix_gets_no_second_one(tokenizer_files, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("<s> w0 w1")
    assert tokenize(load_tokenizer(tokenizer_files), read_corpus(path)).documents == [[2, 3]]
