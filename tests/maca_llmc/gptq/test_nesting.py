"""Which models nested scales are refused for."""

import pytest
from tiny import tiny_config
from transformers import AutoConfig

from maca_llmc.common.errors import CalibrationError, UserError
from maca_llmc.gptq.nesting import refuse_length_dependence

LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "dynamic": {"factor": 2.0},
    "longrope": LONG | {"factor": 4.0, "original_max_position_embeddings": 128},
}


def with_rope(kind):
    return tiny_config(
        "llama", rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}
    )


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_positions_that_do_not_depend_on_the_length_are_allowed(kind):
    refuse_length_dependence(with_rope(kind))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_do_are_refused(kind):
    with pytest.raises(CalibrationError, match=rf"'llama' uses '{kind}' RoPE .*remove nested_sc"):
        refuse_length_dependence(with_rope(kind))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3"])
def test_gemmas_rope_per_kind_of_layer_is_looked_at(family):
    text = tiny_config("gemma3_text")
    config = (
        AutoConfig.for_model("gemma3", text_config=text.to_dict()) if "_" not in family else text
    )
    refuse_length_dependence(config)
    parameters = config.get_text_config().rope_parameters
    assert set(parameters) == {"sliding_attention", "full_attention"}
    parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(CalibrationError, match="'gemma3_text' uses 'dynamic'"):
        refuse_length_dependence(config)


@pytest.mark.parametrize(
    "field",
    [
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"use_bidirectional_attention": "all"},
    ],
)
def test_bidirectional_attention_is_refused(field):
    config = tiny_config("llama")
    for name, value in field.items():
        setattr(config, name, value)
    with pytest.raises(CalibrationError, match="'llama' attends in both directions: remove"):
        refuse_length_dependence(config)


def test_attention_that_sees_only_images_both_ways_is_allowed():
    """Gemma 3's ``vision``: text stays causal."""
    config = tiny_config("llama")
    config.use_bidirectional_attention = "vision"
    refuse_length_dependence(config)


def test_the_error_is_one_line_for_users_and_a_value_error_for_oneshot():
    assert issubclass(CalibrationError, UserError) and issubclass(CalibrationError, ValueError)
