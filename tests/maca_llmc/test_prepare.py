"""What is decided, and said, before the weights are loaded."""

import pytest
import torch
from checkpoints import DATA
from loguru import logger

from maca_llmc import plan, planning, quantize
from maca_llmc import prepare as preparing
from maca_llmc.prepare import prepare


@pytest.mark.parametrize(("kind", "tokens"), [("cpu", 2048), ("cuda", 16_384)])
def test_a_gpu_is_given_more_tokens_at_once(tiny_models, tmp_path, monkeypatch, kind, tokens):
    monkeypatch.setattr(preparing, "resolve_device", torch.device)
    monkeypatch.setattr(preparing, "compute_on", lambda device: None)
    settings = {"model": str(tiny_models("llama")), "device": kind, **DATA}
    assert prepare(tmp_path / "out", **settings).batch_tokens == tokens
    assert prepare(tmp_path / "out", **settings, batch_tokens=8).batch_tokens == 8


def test_linears_that_vllm_fuses_and_that_differ_are_warned_of(tiny_models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage: {b_modifiers: {MaCaModifier: {ignore: [lm_head, 're:.*v_proj'], scheme: W8A8}}}"
    )
    said = []
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        prepare(tmp_path / "out", model=str(tiny_models("llama")), recipe=recipe, **DATA)
    finally:
        logger.remove(handle)
    (message,) = [message for message in said if "vLLM fuses" in message]
    assert message.startswith("q_proj, k_proj, v_proj of model.layers.0.self_attn have different")


def test_calls_leave_the_logging_of_their_program_alone(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "ask_kernels", lambda run: [])
    said = []
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    settings = {"model": str(tiny_models("llama", num_hidden_layers=1)), **DATA}
    for call in (plan, quantize):
        call(tmp_path / "out", **settings)
        logger.warning(call.__name__)
    logger.remove(handle)  # fails where it is gone
    assert {"plan", "quantize"} <= set(said)
