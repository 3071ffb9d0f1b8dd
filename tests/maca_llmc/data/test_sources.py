import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from maca_llmc.common.errors import UserError
from maca_llmc.data import CALIBRATION_SAMPLE, describe_source, read_documents

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

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_unicode_separators_inside_a_row_are_no_ends_of_lines(self, tmp_path, name, separator):
        path = tmp_path / name
        path.write_text(f'{{"text": "one{separator}two"}}\r\n' * 2, encoding="utf-8-sig")
        assert list(read_documents(path)) == [f"one{separator}two"] * 2

    def test_messages_and_named_column(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "body": "text"}])
        assert list(read_documents(path)) == [CHAT]
        assert list(read_documents(path, text_column="body")) == ["text"]

    def test_json_list(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": "one"}, "two", CHAT]))
        assert list(read_documents(path)) == ["one", "two", CHAT]

    @pytest.mark.parametrize("rows", [[{"text": "one"}], [{"text": "one"}, {"text": "two"}]])
    def test_json_lines_called_json(self, tmp_path, rows):
        path = write_jsonl(tmp_path / "a.json", rows)
        assert list(read_documents(path)) == [row["text"] for row in rows]
        path.write_text(path.read_text() + '{"text": \n')
        with pytest.raises(UserError, match=rf"a\.json line {len(rows) + 1} is not JSON"):
            read_documents(path)

    def test_halves_of_characters_are_replaced_and_counted(self, tmp_path, warnings):
        path = tmp_path / "a.jsonl"
        half = [{"role": "user", "content": "b\ud83d"}]
        write_jsonl(path, [{"text": "a\ud83d"}, {"text": "\ud83d\ude00"}, {"messages": half}])
        replaced = [{"role": "user", "content": "b\ufffd"}]
        assert list(read_documents(path)) == ["a\ufffd", "\U0001f600", replaced]
        (warning,) = warnings
        assert "in 2 rows are replaced" in warning and "a.jsonl line 1" in warning

    def test_columns_that_are_not_used_are_named(self, tmp_path, capsys):
        row = {"messages": CHAT, "tools": [{"name": "f"}], "loss_mask": [1], "input_ids": [2]}
        path = write_jsonl(tmp_path / "a.jsonl", [row, {**row, "id": 3}])
        said = "reading messages, tools; columns not used: loss_mask, input_ids"
        read_documents(path)
        assert f"{path}: {said}, id" in capsys.readouterr().err
        read_documents(Dataset.from_list([row]))
        assert said in capsys.readouterr().err
        read_documents(None)
        assert capsys.readouterr().err == ""

    def test_csv_fields_are_texts(self, tmp_path):
        (tmp_path / "a.csv").write_text(
            'text,n\r\n"a, ""b""\nc",1\r\n\r\n007,2\n,3\n' + "x" * 200_000
        )
        with pytest.raises(UserError, match=r"a\.csv line 7 has 1 fields and the first line 2"):
            read_documents(tmp_path / "a.csv")
        text = (tmp_path / "a.csv").read_text() + ",4\n"
        (tmp_path / "a.csv").write_text(text, encoding="utf-8-sig")
        assert list(read_documents(tmp_path / "a.csv")) == ['a, "b"\nc', "007", "x" * 200_000]

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
            ("a.jsonl", "[" * 100_000, r"line 1 cannot be read as JSON"),
            ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"line 1 cannot be read as JSON"),
            ("a.json", '{"text": "a"}\n{"text": \n', r"a\.json line 2 is not JSON"),
            ("a.csv", "text,n\none,1\ntwo\n", r"a\.csv line 3 has 1 fields and the first line 2"),
            ("a.csv", 'text\n"one\ntwo\n', r"a\.csv line 3 is not CSV"),
            ("a.csv", 'text\n"one" two\n', r"a\.csv line 2 is not CSV"),
            ("a.csv", "body\none\n", r"a\.csv line 2 has no column .*it has body"),
            ("a.csv", "text\n", "holds no text"),
            ("a.csv", "", "holds no text"),
            ("a.parquet", "PAR1 nonsense", r"a\.parquet: .* \(the file is cut short or damaged"),
            ("a.docx", "x", r"unknown kind of file: give one of \.txt"),
        ],
    )
    def test_errors(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_documents(tmp_path / name)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv", "a.json", "a.jsonl"])
    def test_not_utf8(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"text\ncaf\xe9")
        with pytest.raises(UserError, match=rf"{name} is not UTF-8 at byte 8 \(line 2\): convert"):
            read_documents(tmp_path / name)

    def test_a_damaged_saved_data_set(self, tmp_path):
        Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "d")
        for file in (tmp_path / "d").glob("*.arrow"):
            file.write_bytes(b"xx")
        with pytest.raises(UserError, match=r"saved data set .* cannot be read .*: save"):
            read_documents(tmp_path / "d")

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

    def test_what_explains_the_data_is_left_out_and_said(self, tmp_path, capsys):
        (tmp_path / "README.md").write_text("about the data")
        (tmp_path / "requirements-dev.txt").write_text("torch")
        (tmp_path / "LICENSE.txt").write_text("all rights")
        (tmp_path / "stats.json").write_text('{"rows": 3}')
        (tmp_path / "x.bin").write_bytes(b"x")
        (tmp_path / "a.json").write_text('[{"text": "one"}]')
        (tmp_path / "b.csv").write_text("text\ntwo\n")
        write_jsonl(tmp_path / "c.jsonl", [{"text": "three"}])
        assert list(read_documents(tmp_path)) == ["one", "two", "three"]
        assert (
            f"{tmp_path}: reading a.json, b.csv, c.jsonl; not reading LICENSE.txt, README.md, "
            "requirements-dev.txt, stats.json, x.bin" in capsys.readouterr().err
        )

    def test_beside_parquet_files_what_is_not_read_is_said(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
        for name in ("a", "b"):
            Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / f"{name}.parquet")
        write_jsonl(tmp_path / "c.jsonl", [{"text": "three"}])
        assert list(read_documents(tmp_path)) == ["a", "b"]
        assert "reading a.parquet, b.parquet; not reading c.jsonl" in capsys.readouterr().err

    def test_a_folder_of_documentation_alone(self, tmp_path):
        (tmp_path / "README.md").write_text("about the data")
        with pytest.raises(UserError, match=r"holds no \.txt"):
            read_documents(tmp_path)

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
