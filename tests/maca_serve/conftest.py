"""A fake vLLM, tiny checkpoint folders and evaluation text."""

import json
import os
import random
import struct
import tempfile
from pathlib import Path

# Before anything imports transformers: nothing here may ask the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from maca_serve.doctor import loadable

FAKE = Path(__file__).parent / "fake"
WORDS = [f"w{i}" for i in range(200)]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 64,
                "symmetric": True,
            },
            "input_activations": None,
        }
    },
}


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> Path:
    """A tokenizer of one token per word that puts `<s>` in front."""
    return _save_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<s> $A")


@pytest.fixture(scope="session")
def ending_tokenizer_files(tmp_path_factory) -> Path:
    """One that also puts `</s>` behind every text."""
    return _save_tokenizer(tmp_path_factory.mktemp("ending"), "<s> $A </s>")


def _save_tokenizer(folder: Path, single: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *WORDS, "</s>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", vocabulary["</s>"])]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    wrapped.add_special_tokens({"eos_token": "</s>"})
    wrapped.save_pretrained(folder)
    return folder


def safetensors_of(size: int) -> bytes:
    """A whole file of that many bytes with one tensor."""
    length = 200
    entry = {"dtype": "U8", "shape": [size - 8 - length], "data_offsets": [0, size - 8 - length]}
    header = json.dumps({"model.norm.weight": entry}).encode().ljust(length)
    return struct.pack("<Q", length) + header + bytes(size - 8 - length)


@pytest.fixture
def make_checkpoint(tmp_path, tokenizer_files):
    """Make a folder that passes for a checkpoint: config, tokenizer, a file of weights."""

    def make(name: str, *, quantized: bool = True, weights: int = 1000, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tokenizer_files.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        content = {**CONFIG, **config}
        if quantized:
            content["quantization_config"] = QUANTIZATION
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "model.safetensors").write_bytes(safetensors_of(weights))
        return folder

    return make


@pytest.fixture
def base(make_checkpoint) -> Path:
    return make_checkpoint("base", quantized=False, weights=4000)


@pytest.fixture
def quantized(make_checkpoint) -> Path:
    return make_checkpoint("w4")


@pytest.fixture
def text(tmp_path) -> Path:
    """Three documents of 700, 400 and 90 words."""
    draw = random.Random(1)
    path = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(draw.choices(WORDS, k=n)), "source": "x"} for n in (700, 400, 90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def fake_vllm(monkeypatch, tmp_path):
    """The fake vLLM for this process and its children; call it to make something go wrong."""
    monkeypatch.syspath_prepend(FAKE)
    paths = [str(FAKE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # an empty one is the current folder
    monkeypatch.delenv("FAKE_VLLM", raising=False)
    # Logs of engines that failed are kept: keep them here.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("FAKE_VLLM_REACHED", str(tmp_path / "reached"))

    # It has no loader that could be asked about tensors: test_doctor_loading.py asks the real one.
    fine = {
        "unasked": None,
        "refused": [],
        "missing": [],
        "unread": [],
        "cut": [],
        "attention": None,
    }
    monkeypatch.setattr(
        loadable, "ask", lambda question: {"loaded": [fine] * len(question["load"])}
    )

    def go_wrong(fault: str) -> None:
        monkeypatch.setenv("FAKE_VLLM", fault)

    return go_wrong


@pytest.fixture
def alive():
    """Tell whether a process runs: a zombie that nobody has waited for does not."""

    def tell(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return tell


@pytest.fixture
def proxy(monkeypatch):
    """An environment that names a proxy, where nothing answers."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
