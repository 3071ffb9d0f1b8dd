"""How a recipe quantizes Linears, and whether they allow it."""

from collections.abc import Iterable
from typing import Any

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)

from maca_llmc.errors import CalibrationError, UserError
from maca_llmc.targets import check_targets, linear_schemes

GROUP_SIZES = (128, 64, 32)
"""Group sizes that vLLM's kernels take, best known first."""

OTHER_GROUP_SIZES = (256, 192, 96, 48, 16)

BITS = range(2, 9)
"""Bits of integers that vLLM reads compressed."""


def dividing_group_sizes(widths: Iterable[int]) -> list[int]:
    """Usual group sizes that divide every width, best first."""
    widths = set(widths)
    return [
        size
        for size in (*GROUP_SIZES, *OTHER_GROUP_SIZES)
        if all(width % size == 0 for width in widths)
    ]


def check_schemes(modifier: Any, model: Any) -> None:
    """Check a quantization modifier against a model's shapes (meta device will do).

    :raises UserError: for no scheme at all, for targets that
        :func:`~maca_llmc.targets.check_targets` refuses, a head that is the embedding, integers of
        more bits than vLLM reads, or a group size that does not divide a width; says which group
        sizes would
    """
    _check_given(modifier)
    targeted = check_targets(modifier, model)
    _check_head(modifier, model, targeted)
    _check_bits(modifier)
    check_gptaq(modifier)
    schemes = linear_schemes([modifier], model)
    for scheme in modifier.resolved_config.config_groups.values():
        size = _group_size(scheme)
        if size is None:
            continue
        widths = {name: width for name, width in targeted.items() if schemes[name] is scheme}
        wrong = {name: width for name, width in widths.items() if width % size}
        if wrong:
            name, width = next(iter(wrong.items()))
            would = dividing_group_sizes(widths.values())
            cure = f"{', '.join(map(str, would))} would" if would else "none of the usual ones does"
            raise UserError(
                f"group size {size} does not divide the input width of {len(wrong)} of "
                f"{len(widths)} Linears, first {name} ({width}): {cure}, and strategy: channel "
                "needs none"
            )


def _check_given(modifier: Any) -> None:
    for scheme in modifier.resolved_config.config_groups.values():
        if not (scheme.weights or scheme.input_activations or scheme.output_activations):
            cache = modifier.kv_cache_scheme is not None
            raise UserError(
                f"the recipe's {type(modifier).__name__} quantizes nothing"
                f"{' but the KV cache' if cache else ''}: give it a scheme for weights"
                f"{', or its kv_cache_scheme to the modifier that has one' if cache else ''}"
            )


def check_gptaq(modifier: Any) -> None:
    """Refuse schemes that GPTAQ's sweep is not written for.

    :raises CalibrationError: names the scheme
    """
    if not getattr(modifier, "gptaq_alpha", 0):
        return
    for scheme in modifier.resolved_config.config_groups.values():
        args = scheme.weights
        if args is None:
            continue
        if args.type != QuantizationType.INT or args.strategy not in ("group", "channel"):
            raise CalibrationError(
                f"gptaq_alpha: works for integers by group or channel, not for {args.type} by "
                f"{args.strategy}: leave it out"
            )


def _check_head(modifier: Any, model: Any, targeted: dict[str, int]) -> None:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = model.get_output_embeddings()
    names = [name for name in targeted if model.get_submodule(name) is head]
    if tied and names:
        raise UserError(
            f"the recipe quantizes {names[0]}, which is the input embedding, too (they are tied): "
            f"add {names[0]} to its ignore list"
        )
    if getattr(modifier, "gptaq_alpha", 0) and names:
        raise UserError(
            f"gptaq_alpha: works within decoder layers, and the recipe quantizes {names[0]}: add "
            "it to its ignore list"
        )


def _check_bits(modifier: Any) -> None:
    for name, scheme in modifier.resolved_config.config_groups.items():
        weights = scheme.weights
        if weights is None or weights.type != QuantizationType.INT:
            continue
        if weights.num_bits not in BITS:
            raise UserError(
                f"the recipe's {name} has weights of {weights.num_bits} bits: vLLM reads integers "
                f"of {BITS[0]} to {BITS[-1]}"
            )


def describe_scheme(scheme: QuantizationScheme) -> str:
    """Such as ``W4A16 int, group 64, symmetric``."""
    weights, inputs = scheme.weights, scheme.input_activations
    activation_bits = inputs.num_bits if inputs is not None else 16
    if weights is None:
        return f"A{activation_bits} only"
    symmetry = "symmetric" if weights.symmetric else "asymmetric"
    kind = QuantizationType(weights.type).value
    return f"W{weights.num_bits}A{activation_bits} {kind}, {_granularity(weights)}, {symmetry}"


def _granularity(weights: QuantizationArgs) -> str:
    if weights.strategy == QuantizationStrategy.GROUP:
        return f"group {weights.group_size}"
    return QuantizationStrategy(weights.strategy).value


def _group_size(scheme: QuantizationScheme) -> int | None:
    weights = scheme.weights
    if weights is None or weights.strategy not in (
        QuantizationStrategy.GROUP,
        QuantizationStrategy.TENSOR_GROUP,
    ):
        return None
    return weights.group_size
