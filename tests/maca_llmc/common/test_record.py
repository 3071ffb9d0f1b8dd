"""The run record's parts and the model card."""

import json
from importlib.metadata import version

import pytest
import torch
from huggingface_hub import ModelCard

from maca_llmc.common import record

RUN = {
    "base_model": "org/base",
    "license": "apache-2.0",
    "scheme": "W4A16 int, group 32, symmetric",
    "method": "MaCa (p = 1)",
    "modifier": {"type": "MaCaModifier"},
    "seed": 7,
    "calibration": {
        "sequences": 6,
        "tokens": 96,
        "source": "a list of 24 documents",
        "lengths": {"8": 4, "32": 2},
    },
}


def test_the_card_is_valid_and_says_what_was_done(tmp_path):
    record.write_card(tmp_path, "model-w4", RUN)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base" and card.data.license == "apache-2.0"
    assert "compressed-tensors" in card.data.tags
    for part in (
        "`org/base` quantized to **W4A16 int, group 32, symmetric** by MaCa (p = 1)",
        "maca-serve up model-w4",
        "6 sequences, 96 tokens of a list of 24 documents (count x length: 4 x 8, 2 x 32); seed"
        "   7",
        "that of the base model (apache-2.0).",
    ):
        assert part in card.text.replace("\n", " ") or part in card.text, part


@pytest.mark.parametrize(("modifier", "tagged"), [("MaCaModifier", True), ("GPTQModifier", False)])
def test_only_what_maca_made_is_tagged_so(tmp_path, modifier, tagged):
    record.write_card(tmp_path, "m", RUN | {"modifier": {"type": modifier}})
    tags = ModelCard.load(tmp_path / "README.md").data.tags
    assert ("maca" in tags) == tagged and {"gptq", "vllm"} <= set(tags)


def test_a_card_without_a_licence_says_so(tmp_path):
    record.write_card(tmp_path, "m", RUN | {"license": None})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None and "its card names none" in card.text


CARDS = {
    "with one": ("---\nlicense: gemma\n---\n# Model\n", "gemma"),
    "with none": ("---\ntags: [a]\n---\n# Model\n", None),
    "without a head": ("# Model\nlicense: mit\n", None),
    "with a broken head": ("---\nlicense: [mit\n---\n# Model\n", None),
    "of nothing": ("", None),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_licence_of_a_base_model_with_a_card(tmp_path, case):
    text, expected = CARDS[case]
    (tmp_path / "README.md").write_text(text)
    assert record.base_license(str(tmp_path)) == expected


def test_the_licence_of_a_base_model_without_a_card(tmp_path):
    assert record.base_license(str(tmp_path)) is None
    assert record.base_license("org/not-in-the-cache") is None


def test_versions_and_machine_are_what_is_installed():
    assert record.versions() == {package: version(package) for package in record.PACKAGES}
    machine = record.machine()
    assert machine["threads"] == torch.get_num_threads() and machine["processor"]
    json.dumps(machine)


def test_processors_of_one_name_with_other_vectors_differ(monkeypatch):
    found = set()
    for vectors in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=vectors: name)
        found.add(record.machine()["processor"])
    assert len(found) == 2


def test_peak_memory_is_in_bytes():
    held = torch.ones(30_000_000)  # 120 MB
    assert record.peak_memory()["peak_rss_bytes"] > held.nbytes
    assert record.peak_memory()["peak_rss_bytes"] < 100e9
