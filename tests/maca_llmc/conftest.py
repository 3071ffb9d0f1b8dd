"""Fixtures that the tests of the quantize side share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)  # four times as fast on models this small, where cores are shared


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folder of a saved tiny model, by family and changes of its shape, made on first use."""
    folders = {}

    def get(family: str, **changes):
        key = (family, *sorted(changes.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[key] = save_tiny_model(family, folder, **changes)
        return folders[key]

    return get


@pytest.fixture
def tiny_model(tiny_models):
    """Load a fresh tiny model of a family, float32."""

    def load(family: str, **changes):
        folder = tiny_models(family, **changes)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return load
