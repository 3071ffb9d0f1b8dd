"""Whole runs on data that are awkward: ids without an embedding, templates with a clock."""

import json

import pytest
from checkpoints import DATA, quantize
from tiny import random_text, save_tiny_model, tiny_tokenizer
from transformers.utils import chat_template_utils

import maca_llmc
from maca_llmc.common.errors import UserError
from maca_llmc.model import loading
from maca_llmc.planning import ask_doctor
from maca_llmc.run.resume import LayerKeeper

DATED = (
    "{{ strftime_now('%d %b %Y %H:%M:%S %f') }}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
)


class StopError(Exception):
    """Stands for a kill."""


def chats(tmp_path, count=24):
    path = tmp_path / "chats.jsonl"
    rows = [{"conversations": [{"from": "human", "value": text}]} for text in random_text(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("added", [True, False], ids=["a token of the text", "the vocabulary"])
def test_ids_without_an_embedding_are_refused_before_loading(tmp_path, monkeypatch, added):
    monkeypatch.setattr(ask_doctor, "find_doctor", lambda: None)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    tokenizer = tiny_tokenizer()
    text = random_text()
    if added:
        tokenizer.add_tokens(["<new>"])
        text = [f"<new>{document}" for document in text]
    rows = len(tokenizer) - 1
    source = save_tiny_model("llama", tmp_path / "model", vocab_size=rows)
    tokenizer.save_pretrained(source)
    for call in (maca_llmc.plan, maca_llmc.quantize):
        with pytest.raises(UserError, match=rf"ids below {rows} \(vocab_size\).* gives {rows} \("):
            call(tmp_path / "out", model=str(source), **DATA | {"data": text})
    with pytest.raises(UserError, match=rf"ids below {rows} "):
        maca_llmc.evaluate(str(source), [], text=text, lengths=[40, 64], windows=2, targets=8)
    assert not (tmp_path / "out").exists()


def test_a_run_killed_on_another_day_goes_on(tmp_path, monkeypatch, capsys):
    source = save_tiny_model("llama", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(source)
    data = chats(tmp_path)
    original = LayerKeeper.keep

    def keep(self, layer):
        original(self, layer)
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(LayerKeeper, "keep", keep)
        with pytest.raises(StopError):
            quantize(source, tmp_path / "out", data=data)
    chat_template_utils._compile_jinja_template.cache_clear()
    output = quantize(source, tmp_path / "out", data=data, resume=True)
    record = json.loads((output / "maca_run.json").read_text())
    counts = record["calibration"]["documents"]
    assert counts["given"] == 24 and counts["used"] <= counts["usable"] <= counts["read"] <= 24
    said = f"documents: 24 given, {counts['read']} read, {counts['usable']} long enough"
    assert f"{said}, {counts['used']} used" in capsys.readouterr().err
