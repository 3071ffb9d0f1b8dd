"""What is decided, and said, before the weights are loaded."""

import pytest
import torch
from checkpoints import DATA
from loguru import logger

from maca_llmc import plan, quantize
from maca_llmc.common.errors import UserError
from maca_llmc.options import with_fields
from maca_llmc.planning import plans
from maca_llmc.run import prepare as preparing
from maca_llmc.run.prepare import prepare


@pytest.mark.parametrize(("kind", "tokens"), [("cpu", 2048), ("cuda", 16_384)])
def test_a_gpu_is_given_more_tokens_at_once(tiny_models, tmp_path, monkeypatch, kind, tokens):
    monkeypatch.setattr(preparing, "resolve_device", torch.device)
    monkeypatch.setattr(preparing, "compute_on", lambda device: None)
    settings = {"model": str(tiny_models("llama")), "device": kind, **DATA}
    assert prepare(tmp_path / "out", with_fields(None, settings)).batch_tokens == tokens
    assert (
        prepare(tmp_path / "out", with_fields(None, settings | {"batch_tokens": 8})).batch_tokens
        == 8
    )


def test_a_plan_needs_no_free_output(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").touch()
    monkeypatch.setattr(plans, "ask_kernels", lambda run: [])
    assert plan(model=str(tiny_models("llama")), **DATA)["modules"]


V_PROJ_APART = "MaCaModifier: {ignore: [lm_head, 're:.*v_proj'], scheme: W8A8}"
DOWN_PROJ_APART = "MaCaModifier: {ignore: [lm_head, 're:.*gate$', 're:.*down_proj'], scheme: W8A8}"


@pytest.mark.parametrize(
    ("family", "modifiers", "says"),
    [
        (
            "llama",
            V_PROJ_APART,
            r"^q_proj, k_proj, v_proj of model\.layers\.0\.self_attn have d",
        ),
        ("qwen3_moe", DOWN_PROJ_APART, r"^parts of model\.layers\.0\.mlp\.experts have d"),
    ],
)
def test_parts_that_vllm_fuses_and_that_differ_are_refused_unless_asked_for(
    tiny_models, tmp_path, monkeypatch, family, modifiers, says
):
    monkeypatch.setattr(plans, "ask_kernels", lambda run: [])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"a_stage: {{b_modifiers: {{{modifiers}}}}}")
    settings = {"model": str(tiny_models(family, num_hidden_layers=1)), "recipe": recipe, **DATA}
    for call in (plan, quantize):
        with pytest.raises(UserError, match=says):
            call(tmp_path / "out", **settings)
        call(tmp_path / "out", **settings, allow_unfused=True)


CACHE = "{num_bits: 8, type: float, symmetric: true, strategy: tensor}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("float", "int"), "8-bit int, tensor, symmetric"),
        (("num_bits: 8", "num_bits: 4"), "4-bit float, tensor, symmetric"),
        (("symmetric: true", "symmetric: false"), "8-bit float, tensor, asymmetric"),
        (("strategy: tensor", "strategy: channel"), "8-bit float, channel, symmetric"),
        (("tensor}", "token, dynamic: true}"), "8-bit float, token, symmetric, dynamic"),
        (("tensor}", "tensor, dynamic: true}"), "8-bit float, tensor, symmetric, dynamic"),
    ],
)
def test_a_kv_cache_that_vllm_does_not_read_is_refused(tiny_models, tmp_path, change, words):
    recipe = tmp_path / "recipe.yaml"
    for modifier in ("MaCaModifier", "QuantizationModifier"):
        cache = CACHE.replace(*change)
        fields = f"scheme: W8A8, ignore: [lm_head], kv_cache_scheme: {cache}"
        recipe.write_text(f"a_stage: {{b_modifiers: {{{modifier}: {{{fields}}}}}}}")
        with pytest.raises(UserError, match=f"vLLM reads a KV cache of .*, not {words}: use"):
            prepare(
                tmp_path / "out",
                with_fields(None, {"model": str(tiny_models("llama")), "recipe": recipe, **DATA}),
            )


def test_calls_leave_the_logging_of_their_program_alone(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "ask_kernels", lambda run: [])
    said = []
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    settings = {"model": str(tiny_models("llama", num_hidden_layers=1)), **DATA}
    for call in (plan, quantize):
        call(tmp_path / "out", **settings)
        logger.warning(call.__name__)
    logger.remove(handle)  # fails where it is gone
    assert {"plan", "quantize"} <= set(said)
