"""A checkpoint of the quantize side says the same in vLLM as in transformers, on real weights."""

import json
import os
from pathlib import Path

import four_bits
import pytest
from maca_serve import up

FOLDER = os.environ.get("MACA_TEST_CHECKPOINTS")
TOLERANCE = 2.0
"""Mean absolute difference, as a multiple of what bfloat16 alone does to the same checkpoint in
transformers: two backends round differently, each about as far from float32. The engine with
activations rounded to 8 bits (vLLM's default with AMX) is at 6 to 9."""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(FOLDER is None, reason="MACA_TEST_CHECKPOINTS names no folder"),
]


@pytest.mark.parametrize(
    "name",
    [
        "base",
        pytest.param("w4a16", marks=four_bits.needed),
        pytest.param("w3-in-4", marks=four_bits.needed),
    ],
)
def test_log_probabilities_agree_with_transformers(name):
    reference = json.loads(Path(FOLDER, "reference.json").read_text())
    with up(Path(FOLDER, name), port=None, max_model_len=512) as engine:
        served = engine.client().prompt_logprobs(reference["prompts"])
    differences = [
        abs(ours - theirs)
        for own, other in zip(served, reference["log_probabilities"][name], strict=True)
        for ours, theirs in zip(own, other, strict=True)
    ]
    assert len(differences) == sum(len(prompt) - 1 for prompt in reference["prompts"])
    mean = sum(differences) / len(differences)
    noise = reference["noise"][name]
    print(f"{name}: mean difference {mean:.4f} nats, bfloat16 alone {noise:.4f}")
    assert mean < TOLERANCE * noise
