"""Fixtures that the tests of the quantize side share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folder of a saved tiny model, by family, made on first use."""
    folders = {}

    def get(family: str):
        if family not in folders:
            folders[family] = save_tiny_model(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


@pytest.fixture
def tiny_model(tiny_models):
    """Load a fresh tiny model of a family, float32."""

    def load(family: str):
        model = AutoModelForCausalLM.from_pretrained(tiny_models(family), dtype=torch.float32)
        return model.eval()

    return load
