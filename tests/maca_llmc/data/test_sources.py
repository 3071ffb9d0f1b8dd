import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from maca_llmc.data import CALIBRATION_SAMPLE, describe_source, read_documents
from maca_llmc.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestFiles:
    @pytest.mark.parametrize("name", ["a.txt", "a.md"])
    def test_text_file_is_one_document(self, tmp_path, name):
        (tmp_path / name).write_text("one\n\ntwo\n")
        assert list(read_documents(tmp_path / name)) == ["one\n\ntwo\n"]
        assert list(read_documents(str(tmp_path / name))) == ["one\n\ntwo\n"]

    def test_jsonl_rows_in_order_blank_ones_left_out(self, tmp_path):
        rows = [{"text": "one"}, {"text": "  "}, {"text": "two", "messages": CHAT}]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        path.write_text(path.read_text() + "\n\n")
        assert list(read_documents(path)) == ["one", "two"]

    def test_jsonl_keeps_unicode_line_separators_inside_a_row(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
        assert list(read_documents(path)) == ["one\u2028two"]

    def test_messages_and_named_column(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "body": "text"}])
        assert list(read_documents(path)) == [CHAT]
        assert list(read_documents(path, text_column="body")) == ["text"]

    def test_json_list(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": "one"}, "two", CHAT]))
        assert list(read_documents(path)) == ["one", "two", CHAT]

    def test_csv_and_parquet(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "a.csv").write_text("text,n\none,1\ntwo,2\n")
        assert list(read_documents(tmp_path / "a.csv")) == ["one", "two"]
        (tmp_path / "folder").mkdir()
        Dataset.from_dict({"text": ["three"]}).to_parquet(tmp_path / "folder" / "a.parquet")
        (tmp_path / "folder" / "README.md").write_text("about the data")
        assert list(read_documents(tmp_path / "folder" / "a.parquet")) == ["three"]
        assert list(read_documents(tmp_path / "folder")) == ["three"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
            ("a.jsonl", '{"text": "a"}\n\n{"text": 3}\n', r"a\.jsonl line 3 is neither text nor"),
            ("a.jsonl", '{"text": "a"}\n{"b": 1, "c": 2}\n', r"line 2 has no column .*it has b, c"),
            ("a.jsonl", '{"messages": [{"from": "x"}]}\n', r"line 1 is neither text nor"),
            ("a.jsonl", "\n", "holds no text"),
            ("a.txt", " \n", "holds no text"),
            ("a.json", '{"b": "a"}', r"a\.json has no column .*it has b"),
            ("a.json", "[", "is not JSON"),
            ("a.docx", "x", r"unknown kind of file: give one of \.txt"),
        ],
    )
    def test_errors(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_documents(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_not_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(UserError, match="not UTF-8 at byte 3"):
            read_documents(tmp_path / "a.txt")

    @pytest.mark.parametrize("name", ["/nowhere/data", "./nowhere", "nowhere.jsonl", "a/b/c"])
    def test_missing_path_is_not_asked_of_the_hub(self, name):
        with pytest.raises(UserError, match="no such file or folder"):
            read_documents(name)


class TestFolders:
    def test_sorted_by_path_hidden_left_out(self, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "x.txt").write_text("hidden")
        (tmp_path / "b" / "c.txt").write_text("third")
        (tmp_path / "a.md").write_text("first")
        write_jsonl(tmp_path / "a.z.jsonl", [{"text": "second"}])
        (tmp_path / "ignored.bin").write_bytes(b"\xff")
        assert list(read_documents(tmp_path)) == ["first", "second", "third"]

    def test_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no \.txt"):
            read_documents(tmp_path)

    def test_saved_dataset(self, tmp_path):
        Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "d")
        assert list(read_documents(tmp_path / "d")) == ["one", "two"]

    def test_saved_splits(self, tmp_path):
        splits = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
        DatasetDict(splits).save_to_disk(tmp_path / "d")
        assert list(read_documents(tmp_path / "d", split="test")) == ["test"]
        with pytest.raises(UserError, match="no split 'dev': it has train, test"):
            read_documents(tmp_path / "d", split="dev")


class TestInMemory:
    def test_dataset_is_read_lazily_and_ignores_its_format(self):
        data = Dataset.from_dict({"n": [1, 2], "text": ["one", "two"]}).with_format("numpy")
        documents = read_documents(data)
        assert not isinstance(documents, list)
        assert documents[1] == "two" and documents[0:2] == ["one", "two"]
        assert isinstance(documents[0], str)

    def test_dataset_of_chats(self):
        assert list(read_documents(Dataset.from_dict({"messages": [CHAT]}))) == [CHAT]

    def test_dataset_column(self):
        data = Dataset.from_dict({"a": ["one"], "b": [1]})
        assert list(read_documents(data, text_column="a")) == ["one"]
        with pytest.raises(UserError, match="'messages' or 'conversations': it has a, b"):
            read_documents(data)
        with pytest.raises(UserError, match="has no column 'body': it has a, b"):
            read_documents(data, text_column="body")
        with pytest.raises(UserError, match="row 1 is neither text nor"):
            read_documents(data, text_column="b")[0]

    def test_list(self):
        assert list(read_documents(["one", CHAT, {"text": "two"}])) == ["one", CHAT, "two"]

    @pytest.mark.parametrize("empty", [[], ["", " \n"], [{"text": None}]])
    def test_empty(self, empty):
        with pytest.raises(UserError, match="holds no text"):
            read_documents(empty)

    def test_empty_dataset(self):
        with pytest.raises(UserError, match="holds no text"):
            read_documents(Dataset.from_dict({"text": []}))

    def test_other_types(self):
        with pytest.raises(UserError, match="cannot read data from dict"):
            read_documents({"text": "x"})


class TestHub:
    def test_unreachable(self, monkeypatch):
        def refuse(**arguments):
            raise ConnectionError("Couldn't reach it")

        monkeypatch.setattr("maca_llmc.data.sources.load_dataset", refuse)
        with pytest.raises(UserError, match=r"hub cannot be reached: .*\.jsonl file or a folder"):
            read_documents("somebody/data")

    def test_unknown_split(self, monkeypatch):
        def refuse(**arguments):
            raise ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore")

        monkeypatch.setattr("maca_llmc.data.sources.load_dataset", refuse)
        with pytest.raises(
            UserError, match=r"somebody/data: Unknown split .*'train'\]\. \(check --split"
        ):
            read_documents("somebody/data", split="dev")

    def test_name_configuration_and_split_are_passed_on(self, monkeypatch):
        asked = {}

        def load(**arguments):
            asked.update(arguments)
            return Dataset.from_dict({"text": ["one"]})

        monkeypatch.setattr("maca_llmc.data.sources.load_dataset", load)
        assert list(read_documents("me/data", split="train[:1]", config_name="en")) == ["one"]
        assert asked == {"path": "me/data", "name": "en", "split": "train[:1]"}


def test_sample_is_the_default():
    assert list(read_documents(None)) == list(read_documents(CALIBRATION_SAMPLE))


def test_describe_source(tmp_path):
    assert describe_source(None) == "the shipped English sample (calibration.jsonl)"
    assert describe_source(tmp_path) == str(tmp_path)
    assert describe_source("me/data", config_name="en") == "me/data/en (train)"
    assert describe_source(["a", "b"]) == "a list of 2 documents"
    assert describe_source(Dataset.from_dict({"text": ["a"]})) == "a datasets.Dataset of 1 rows"
