"""Chats as data sets hold them, and what a chat template makes of them."""

import json

import pytest
from datasets import Dataset
from jinja2 import TemplateError

from maca_llmc.common.errors import UserError
from maca_llmc.data import build_calibration_set, read_documents
from maca_llmc.data.calibration import tokenize
from maca_llmc.data.chats import render

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
PLAIN = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }} <end> {% endfor %}"
PARTS_ONLY = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "w7"}}]
CALL = {"type": "function", "function": {"name": "w7", "arguments": '{"x": null}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}


@pytest.fixture
def templated(make_tokenizer):
    return lambda template=PLAIN: make_tokenizer(chat_template=template)


def one_row(tmp_path, row, name="a.jsonl"):
    path = tmp_path / name
    path.write_text(json.dumps(row) + "\n")
    (document,) = read_documents(path)
    return document


def refused(tokenizer, tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        render(tokenizer, one_row(tmp_path, row))
    assert "\n" not in str(caught.value) and "a.jsonl line 1" in str(caught.value)


class TestContent:
    def test_text_parts_are_text(self, templated, tmp_path):
        parts = [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]
        document = one_row(tmp_path, {"messages": [{"role": "user", "content": parts}]})
        assert render(templated(), document) == "<user> w1\nw2 <end> "

    @pytest.mark.parametrize(
        "message",
        [{"role": "user", "content": "w1"}, {"role": "user", "content": [{"text": "w1"}]}],
    )
    def test_a_template_that_takes_parts_alone_gets_them(self, templated, tmp_path, message):
        document = one_row(tmp_path, {"messages": [message]})
        assert render(templated(PARTS_ONLY), document) == "w1 "

    @pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
    def test_images_and_audio_are_named(self, templated, tmp_path, kind):
        parts = [{"type": kind, kind: "x"}, {"type": "text", "text": "w1"}]
        messages = [CHAT[1], {"role": "user", "content": parts}]
        refused(templated(), tmp_path, {"messages": messages}, f"message 2 has a part .*'{kind}'")

    @pytest.mark.parametrize("content", [3, {"text": "w1"}, [["w1"]]])
    def test_other_content_is_named(self, templated, tmp_path, content):
        row = {"messages": [{"role": "user", "content": content}]}
        refused(templated(), tmp_path, row, "message 1.* type")

    def test_rows_of_a_dataset_have_keys_of_other_rows(self, templated):
        rows = [
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]},
            {"messages": [{"role": "assistant", "content": [], "tool_calls": [CALL]}]},
        ]
        first = read_documents(Dataset.from_list(rows))[0]
        assert list(first) == [{"role": "user", "content": "w1"}]


class TestToolCalls:
    @pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
    def test_need_no_content(self, templated, tmp_path, content):
        document = one_row(tmp_path, {"messages": [CHAT[0], CALLING | content]})
        assert render(templated(), document) == "<user> w1 w2 <end> <assistant>  <end> "

    def test_a_template_that_looks_for_none_finds_it(self, templated, tmp_path):
        template = "{% if messages[0].content is none %}call{% else %}lost{% endif %}"
        document = one_row(tmp_path, {"messages": [CALLING]})
        assert render(templated(template), document) == "call"

    def test_arguments_in_json_are_not_quoted_twice(self, templated, tmp_path):
        template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
        document = one_row(tmp_path, {"messages": [CALLING]})
        assert render(templated(template), document) == '{"x": null}'

    def test_a_message_of_nothing_is_named(self, templated, tmp_path):
        refused(templated(), tmp_path, {"messages": [{"role": "user"}]}, r"\(user\) has no content")

    @pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
    @pytest.mark.parametrize("kind", ["file", "dataset"])
    def test_tools_reach_the_template(self, templated, tmp_path, tools, kind):
        row = {"messages": CHAT, "tools": tools}
        document = one_row(tmp_path, row)
        if kind == "dataset":
            document = read_documents(Dataset.from_list([row]))[0]
        template = "{% if tools %}{{ tools[0].function.name }}{% endif %}"
        assert render(templated(template), document) == "w7"

    @pytest.mark.parametrize("tools", ["{", "3", ["w7"]])
    def test_broken_tools_are_named(self, templated, tmp_path, tools):
        refused(templated(), tmp_path, {"messages": CHAT, "tools": tools}, "its tools are no")


class TestForms:
    @pytest.mark.parametrize("spelled", [json.dumps(CHAT), json.dumps(CHAT, indent=1), str(CHAT)])
    @pytest.mark.parametrize("column", ["messages", "conversations", "text"])
    def test_messages_spelled_out_in_a_text(self, tmp_path, spelled, column):
        assert one_row(tmp_path, {column: spelled}) == CHAT
        path = tmp_path / "a.csv"
        Dataset.from_dict({column: [spelled]}).to_csv(path)
        assert list(read_documents(path)) == [CHAT]

    def test_a_text_that_only_looks_like_messages_stays_one(self, tmp_path):
        for text in ('[{"role": 1', '[{"name": "x"}]', "[1] see below"):
            assert one_row(tmp_path, {"text": text}) == text

    def test_messages_that_cannot_be_read_are_no_text(self, tmp_path):
        with pytest.raises(UserError, match=r"line 1: 'messages' is a text that is no list"):
            one_row(tmp_path, {"messages": "[{'role': 'user' 'content'"})

    def test_sharegpt(self, tmp_path):
        turns = [("system", "w0"), ("human", "w1 w2"), ("gpt", "w3")]
        row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        expected = [{"role": "system", "content": "w0"}, *CHAT]
        assert one_row(tmp_path, row) == expected
        assert list(read_documents(Dataset.from_list([row]))) == [expected]
        path = tmp_path / "a.jsonl"
        assert list(read_documents(path, text_column="conversations")) == [expected]

    def test_an_unknown_speaker_is_named(self, tmp_path):
        row = {"conversations": [{"from": "narrator", "value": "w1"}]}
        with pytest.raises(UserError, match=r"line 1, message 1 is from 'narrator': known are hum"):
            one_row(tmp_path, row)

    @pytest.mark.parametrize("blank", ["", " ", None])
    def test_messages_beside_an_empty_text(self, tmp_path, blank):
        row = {"text": blank, "messages": CHAT}
        assert one_row(tmp_path, row) == CHAT
        assert list(read_documents(Dataset.from_list([row, {"text": "w5", "messages": []}]))) == [
            CHAT,
            "w5",
        ]


class TestRefusals:
    def test_a_system_message_that_the_template_refuses(self, templated, tmp_path):
        template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}"
            "{% endif %}" + PLAIN
        )
        row = {"messages": [{"role": "system", "content": "w0"}, *CHAT]}
        said = r"refuses it \(No system role\): without its system message it is taken: put that"
        refused(templated(template), tmp_path, row, said)

    @pytest.mark.parametrize(
        "template",
        ["{{ messages[0].name.first }}", "{{ messages[9].role }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}"],
    )
    def test_other_mistakes_are_said_as_they_are(self, templated, tmp_path, template):
        refused(templated(template), tmp_path, {"messages": CHAT}, "refuses it .*: mend or remove")

    def test_a_broken_template(self, templated, tmp_path):
        refused(templated("{% for %}"), tmp_path, {"messages": CHAT}, "refuses it")


def test_a_template_that_writes_the_date_gives_the_same_on_every_day(templated, monkeypatch):
    template = "{{ strftime_now('%d %b %Y %H:%M:%S %f') }} " + PLAIN
    first = render(templated(template), CHAT)

    def today(*_):
        raise TemplateError("the clock was asked")

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)
    assert render(templated(template), CHAT) == first


@pytest.mark.parametrize("times", [1, 2])
def test_a_text_that_a_template_has_rendered_gets_no_second_bos(with_bos, times):
    assert tokenize(with_bos, "<bos> " * times + "w1 w2", [1]) == tokenize(with_bos, "w1 w2", [1])
    built = build_calibration_set(
        with_bos, source=["<bos> " * times + "w1 w2"] * 9, scales=(3,), tokens=9
    )
    assert [ids.tolist()[0] for ids in built.sequences] == [1] * 3
    assert all(1 not in ids.tolist()[1:] for ids in built.sequences)
