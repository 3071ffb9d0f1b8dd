"""How a recipe quantizes Linears, and whether they allow it."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from pydantic import ValidationError

from maca_llmc.common.errors import CalibrationError, UserError
from maca_llmc.llmcompressor_api import QuantizationMixin, observer_names
from maca_llmc.recipe.targets import FUSED, check_targets, linear_schemes
from maca_llmc.run.written import check_roundtrip

GROUP_SIZES = (128, 64, 32)
"""Group sizes that vLLM's kernels take, best known first."""

OTHER_GROUP_SIZES = (256, 192, 96, 48, 16)

BITS = range(2, 9)
"""Bits of integers that vLLM reads compressed."""

BY_ROW = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
"""Strategies whose scales belong to rows: how vLLM reads integers without quantized inputs."""


def dividing_group_sizes(widths: Iterable[int]) -> list[int]:
    """Usual group sizes that divide every width, best first."""
    widths = set(widths)
    return [
        size
        for size in (*GROUP_SIZES, *OTHER_GROUP_SIZES)
        if all(width % size == 0 for width in widths)
    ]


def check_schemes(modifier: Any, model: Any, text_only: bool = True) -> None:
    """Check a quantization modifier against a model's shapes (meta device will do).

    :param text_only: calibration is on text

    :raises CalibrationError: for no scheme at all, for targets that
        :func:`~maca_llmc.recipe.targets.check_targets` refuses, a head that is the embedding, for
        schemes that could not be written as they are computed or that vLLM reads of no model, or a
        group or block size that does not divide a width; says which group sizes would
    """
    check_arguments(modifier)
    _check_given(modifier)
    targeted = check_targets(modifier, model, text_only)
    _check_head(modifier, model, targeted)
    _check_kinds(modifier)
    _check_cache_scheme(modifier)
    check_gptaq(modifier)
    schemes = linear_schemes([modifier], model)
    for scheme in modifier.resolved_config.config_groups.values():
        names = [name for name in targeted if schemes[name] is scheme]
        _check_groups_divide(scheme, {name: targeted[name] for name in names})
        _check_blocks_divide(scheme, {name: model.get_submodule(name) for name in names})


def check_arguments(modifier: Any) -> None:
    """Refuse what pydantic would, had it looked: a modifier puts its fields into schemes unseen.

    :raises CalibrationError: for an activation ordering or an observer that there is not
    """
    for name, scheme in modifier.resolved_config.config_groups.items():
        try:
            QuantizationScheme.model_validate(scheme.model_dump())
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise CalibrationError(f"the recipe's {name}: {said}") from error
        for args in (scheme.weights, scheme.input_activations, scheme.output_activations):
            observer = None if args is None else args.observer
            if observer and observer.lower().replace("-", "_") not in observer_names():
                raise CalibrationError(
                    f"no observer {observer!r}: use one of {', '.join(observer_names())}"
                )


def check_order(modifiers: Sequence[Any]) -> None:
    """Refuse one modifier twice, and one that changes weights which others have quantized.

    :raises CalibrationError: names it
    """
    names = [type(modifier).__name__ for modifier in modifiers]
    for name in names:
        if names.count(name) > 1:
            raise CalibrationError(
                f"has {name} {names.count(name)} times: give one all config_groups"
            )
    quantizing = [isinstance(modifier, QuantizationMixin) for modifier in modifiers]
    for number, name in enumerate(names):
        if not quantizing[number] and any(quantizing[:number]):
            raise CalibrationError(f"{name} would change what is quantized by then: put it first")


def _check_groups_divide(scheme: QuantizationScheme, widths: dict[str, int]) -> None:
    size = _group_size(scheme)
    wrong = {name: width for name, width in widths.items() if size and width % size}
    if wrong:
        name, width = next(iter(wrong.items()))
        would = dividing_group_sizes(widths.values())
        cure = f"{', '.join(map(str, would))} would" if would else "none of the usual ones does"
        raise CalibrationError(
            f"group size {size} does not divide the input width of {len(wrong)} of "
            f"{len(widths)} Linears, first {name} ({width}): {cure}, and strategy: channel "
            "needs none"
        )


def _check_blocks_divide(scheme: QuantizationScheme, modules: dict[str, torch.nn.Module]) -> None:
    """All of a width, and of the rows of what vLLM puts another part behind."""
    block = scheme.weights.block_structure if scheme.weights else None
    if block is None:
        return
    first_parts = {kind for fused in FUSED for kind in fused[:-1]}
    for name, module in modules.items():
        rows, width = module.weight.shape  # type: ignore[misc]
        before_another = name.rpartition(".")[2] in first_parts
        if width % block[1] or (before_another and rows % block[0]):
            raise CalibrationError(
                f"blocks of {block[0]} x {block[1]} do not divide {name} ({rows} x {width}): vLLM "
                "reads no such checkpoint, use strategy: channel (FP8_DYNAMIC), or add it to the "
                "ignore list"
            )


def _check_given(modifier: Any) -> None:
    groups = modifier.resolved_config.config_groups.items()
    if not any(scheme.weights for _, scheme in groups):
        cache = modifier.kv_cache_scheme is not None
        raise CalibrationError(
            f"the recipe's {type(modifier).__name__} quantizes nothing"
            f"{' but the KV cache' if cache else ''}: give it a scheme for weights"
            f"{', or its kv_cache_scheme to the modifier that has one' if cache else ''}"
        )
    for name, scheme in groups:
        if scheme.weights is None:
            raise CalibrationError(
                f"the recipe's {name} has no weights, and vLLM reads no group without: give it "
                "some or leave it out"
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
        raise CalibrationError(
            f"the recipe quantizes {names[0]}, which is the input embedding, too (they are tied): "
            f"add {names[0]} to its ignore list"
        )
    if getattr(modifier, "gptaq_alpha", 0) and names:
        raise CalibrationError(
            f"gptaq_alpha: works within decoder layers, and the recipe quantizes {names[0]}: add "
            "it to its ignore list"
        )
    for name in names:
        targets = modifier.resolved_targets
        if not any(name == t or (t[:3] == "re:" and re.match(t[3:], name)) for t in targets):
            raise CalibrationError(
                f"the recipe quantizes {name} by its class, and vLLM only takes a head that a "
                f"target names for quantized: add {name} to the ignore list, or 're:.*{name}$' to "
                "the targets"
            )


def _check_kinds(modifier: Any) -> None:
    """Refuse what could not be written, or is read by nothing."""
    for name, scheme in modifier.resolved_config.config_groups.items():
        weights = scheme.weights
        assert weights is not None  # checked before
        if weights.dynamic:
            raise CalibrationError(
                f"the recipe's {name} has weights with dynamic: {str(weights.dynamic).lower()}, "
                "which leaves nothing to compute: leave it out"
            )
        if scheme.output_activations is not None:
            raise CalibrationError(
                f"the recipe's {name} has output_activations, whose scales are not calibrated "
                "here: leave them out"
            )
        if weights.type == QuantizationType.INT:
            _check_integers(name, scheme)
        check_roundtrip(name, scheme)


def _check_integers(name: str, scheme: QuantizationScheme) -> None:
    weights = scheme.weights
    assert weights is not None
    if weights.num_bits not in BITS:
        raise CalibrationError(
            f"the recipe's {name} has weights of {weights.num_bits} bits: vLLM reads integers "
            f"of {BITS[0]} to {BITS[-1]}"
        )
    if scheme.input_activations is None and weights.strategy not in BY_ROW:
        raise CalibrationError(
            f"the recipe's {name} has integers by {_granularity(weights)}: vLLM reads integer "
            "weights by group or channel, use strategy: channel"
        )


def _check_cache_scheme(modifier: Any) -> None:
    """Refuse a KV cache scheme that vLLM's ``CompressedTensorsKVCacheMethod`` does not take."""
    args = modifier.kv_cache_scheme
    if args is None:
        return
    readable = (
        args.num_bits == 8
        and args.type == QuantizationType.FLOAT
        and args.symmetric
        and args.strategy in (QuantizationStrategy.TENSOR, QuantizationStrategy.ATTN_HEAD)
    )
    if args.dynamic or not readable:
        raise CalibrationError(
            f"kv_cache_scheme: vLLM reads a KV cache of static symmetric 8-bit floats by tensor, "
            f"not {describe_arguments(args)}: use {{num_bits: 8, type: float, symmetric: true, "
            "strategy: tensor}"
        )


def describe_arguments(args: QuantizationArgs) -> str:
    """Such as ``8-bit int, tensor, symmetric``."""
    symmetry = "symmetric" if args.symmetric else "asymmetric"
    kind = QuantizationType(args.type).value
    dynamic = ", dynamic" if args.dynamic else ""
    return f"{args.num_bits}-bit {kind}, {_granularity(args)}, {symmetry}{dynamic}"


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


def check_tunable(schemes: Iterable[QuantizationScheme]) -> None:
    """Refuse ``--tune`` for weights that :func:`maca_llmc.tune` does not take.

    :raises UserError: names the format
    """
    for scheme in schemes:
        weights = scheme.weights
        if weights is None:
            continue
        by_row = weights.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
        if weights.type != QuantizationType.INT or not by_row:
            raise UserError(
                f"--tune takes integers by group or channel, not {describe_scheme(scheme)}: drop it"
            )
