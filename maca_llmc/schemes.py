"""Which Linears a recipe quantizes, how, and whether their widths allow it."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import match_named_modules

from maca_llmc.errors import CalibrationError, UserError

GROUP_SIZES = (128, 64, 32)
"""Group sizes that vLLM's kernels take, best known first."""

OTHER_GROUP_SIZES = (256, 192, 96, 48, 16)

BITS = range(2, 9)
"""Bits of integers that vLLM reads compressed."""

LEFT_ALONE = (
    "lm_head",
    r"re:.*(vision|visual|audio).*",
    r"re:.*multi_modal_projector.*",
    r"re:.*mlp\.gate$",
    r"re:.*router.*",
)
"""What stays unquantized by default: output head, other modalities, and routers of experts."""


def default_ignore(model: torch.nn.Module) -> list[str]:
    """The entries of ``LEFT_ALONE`` that match anything in ``model``."""
    names = [name for name, _ in model.named_modules()]
    return [
        entry
        for entry in LEFT_ALONE
        if any(
            re.match(entry[3:], name) if entry.startswith("re:") else name == entry
            for name in names
        )
    ]


def linear_widths(
    model: torch.nn.Module, targets: Iterable[str], ignore: Iterable[str]
) -> dict[str, int]:
    """Input width of each Linear that ``targets`` and ``ignore`` leave to quantize, by name."""
    return {
        name: module.in_features
        for name, module in match_named_modules(model, list(targets), list(ignore))
        if isinstance(module, torch.nn.Linear)
    }


def dividing_group_sizes(widths: Iterable[int]) -> list[int]:
    """Usual group sizes that divide every width, best first."""
    widths = set(widths)
    return [
        size
        for size in (*GROUP_SIZES, *OTHER_GROUP_SIZES)
        if all(width % size == 0 for width in widths)
    ]


def check_schemes(modifier: Any, model: Any) -> None:
    """Check a quantization modifier's schemes against a model's shapes (meta device will do).

    :raises UserError: when it targets nothing, or modules that text does not go through (a vision
        tower), or a head that is the embedding; when an entry of its ignore list names no module,
        integers have more bits than vLLM reads, or a group size does not divide a width; says
        which group sizes would
    """
    ignore = list(modifier.ignore)
    _check_ignore(model, ignore)
    targeted = linear_widths(model, modifier.resolved_targets, ignore)
    reached = _reached_by_text(model)
    unreached = [name for name in targeted if name not in reached]
    if unreached:
        raise UserError(
            f"the recipe quantizes {len(unreached)} Linears that text does not go through, first "
            f"{unreached[0]}: add 're:{_branch(unreached[0], reached)}.*' to its ignore list"
        )
    if not targeted:
        raise UserError(
            f"the recipe's targets {sorted(modifier.resolved_targets)} match no Linear of the "
            "model: use targets: [Linear]"
        )
    _check_head(model, targeted)
    _check_bits(modifier)
    check_gptaq(modifier)
    if modifier.bypass_divisibility_checks:
        return
    for scheme in modifier.resolved_config.config_groups.values():
        size = _group_size(scheme)
        if size is None:
            continue
        widths = linear_widths(model, scheme.targets, ignore)
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


def check_overlap(modifiers: list[Any], model: Any) -> None:
    """Check that no two modifiers quantize one Linear.

    :raises UserError: names it; llm-compressor would let the later one have it
    """
    owner: dict[str, Any] = {}
    for modifier in modifiers:
        for name in linear_widths(model, modifier.resolved_targets, modifier.ignore):
            first = type(owner.setdefault(name, modifier)).__name__
            if owner[name] is not modifier:
                raise UserError(
                    f"{name} is quantized by {first} and by {type(modifier).__name__}: narrow the "
                    "targets of one, or add it to its ignore list"
                )


def check_gptaq(modifier: Any) -> None:
    """Refuse schemes that GPTAQ's sweep is not written for.

    :raises CalibrationError: names the scheme
    """
    if not getattr(modifier, "gptaq_alpha", 0):
        return
    for scheme in modifier.resolved_config.config_groups.values():
        args = scheme.weights
        if args.type != QuantizationType.INT or args.strategy not in ("group", "channel"):
            raise CalibrationError(
                f"gptaq_alpha: works for integers by group or channel, not for {args.type} by "
                f"{args.strategy}: leave it out"
            )


def _check_ignore(model: Any, ignore: list[str]) -> None:
    """Regular expressions may match nothing: recipes for several models have some."""
    for entry in ignore:
        if not entry.startswith("re:") and not any(match_named_modules(model, [entry])):
            raise UserError(
                f"the recipe ignores {entry!r}, which is no module of the model: mend the name or "
                "leave it out"
            )


def _check_head(model: Any, targeted: dict[str, int]) -> None:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = model.get_output_embeddings()
    names = [name for name in targeted if model.get_submodule(name) is head]
    if tied and names:
        raise UserError(
            f"the recipe quantizes {names[0]}, which is the input embedding, too (they are tied): "
            f"add {names[0]} to its ignore list"
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


def _reached_by_text(model: Any) -> set[str]:
    """Names of the modules of the language model; of one with an encoder, of all of it."""
    if getattr(model.config, "is_encoder_decoder", False):
        return {name for name, _ in model.named_modules()}
    reached = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return {name for name, module in model.named_modules() if module in reached}


def _branch(name: str, reached: set[str]) -> str:
    """The topmost part of ``name`` that nothing in ``reached`` is part of."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix not in reached | _above(reached)), name)


def _above(names: set[str]) -> set[str]:
    return {name[:index] for name in names for index, letter in enumerate(name) if letter == "."}


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
