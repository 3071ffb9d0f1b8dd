"""Is the beginning of a long sequence what the short sequence would have been?"""

from typing import Any

from maca_llmc.common.errors import CalibrationError

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def refuse_length_dependence(config: Any) -> None:
    """Refuse models for which nested scales would not mean what they say.

    Under causal attention the first l rows of a long sequence are exactly the activations of the
    short one, if positions do not depend on the length either.

    :param config: a transformers configuration; of a multimodal model, its text part is looked at
    :raises CalibrationError: for bidirectional attention, and for RoPE scaling that depends on the
        length (dynamic, longrope)
    """
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False or getattr(
        text, "use_bidirectional_attention", None
    ) in (True, "all"):
        raise CalibrationError(
            f"nested_scales needs causal attention and {text.model_type!r} attends in both "
            "directions: remove nested_scales"
        )
    for rope_type in _rope_types(getattr(text, "rope_parameters", None) or {}):
        if any(kind in rope_type for kind in LENGTH_DEPENDENT_ROPE):
            raise CalibrationError(
                f"nested_scales needs positions that do not depend on the length and "
                f"{text.model_type!r} uses {rope_type!r} RoPE scaling: remove nested_scales"
            )


def _rope_types(parameters: dict[str, Any]) -> list[str]:
    """RoPE types of a flat dictionary or of one per kind of layer (Gemma 3)."""
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [
        value["rope_type"]
        for value in parameters.values()
        if isinstance(value, dict) and "rope_type" in value
    ]
