"""What tests of several files do with checkpoints."""

import json

import torch
from compressed_tensors.quantization import QuantizationStatus
from safetensors.torch import load_file
from tiny import random_text
from transformers import AutoConfig, CompressedTensorsConfig

import maca_llmc
from maca_llmc.model.loading import model_class_of

DATA = {"data": random_text(), "lengths": [8, 16, 32], "tokens": 128}
"""A calibration of a few short sequences."""


def quantize(folder, output, recipe=None, **settings):
    """``maca_llmc.quantize`` on little data."""
    return maca_llmc.quantize(output, model=str(folder), recipe=recipe, **DATA | settings)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def load(folder, dequantize=False):
    """The checkpoint in transformers."""
    config = AutoConfig.from_pretrained(folder)
    extra = {}
    if getattr(config, "quantization_config", None) is not None and dequantize:
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return model_class_of(config).from_pretrained(folder, dtype=torch.float32, **extra).eval()


def quantized_modules(folder):
    """Names of the modules that hold codes, as transformers loads the checkpoint."""
    return {
        name
        for name, module in load(folder).named_modules()
        if getattr(module, "quantization_status", None) == QuantizationStatus.COMPRESSED
    }


def greedy(model, prompts, count=8):
    """Greedy continuations, token by token without a cache."""
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = prompt.clone()
            for _ in range(count):
                ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
            rows.append(ids)
    return rows
