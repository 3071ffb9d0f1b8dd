import pytest
from maca_serve.corpus import DEFAULT_TEXT, load_tokenizer, read_corpus, tokenize
from maca_serve.errors import UserError


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
    assert corpus.path == DEFAULT_TEXT
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
