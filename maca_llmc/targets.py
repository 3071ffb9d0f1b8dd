"""What the targets and the ignore list of a recipe name in a model."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import KV_CACHE_TARGETS
from compressed_tensors.utils import match_named_modules, match_targets

from maca_llmc.errors import UserError

LEFT_ALONE = (
    "lm_head",
    r"re:.*(vision|visual|audio).*",
    r"re:.*multi_modal_projector.*",
    r"re:.*mlp\.gate$",
    r"re:.*router.*",
)
"""What stays unquantized by default: output head, other modalities, and routers of experts."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one input that vLLM makes one of, in the models that have them by these names."""


def default_ignore(model: torch.nn.Module) -> list[str]:
    """The entries of ``LEFT_ALONE`` that match anything in ``model``."""
    names = [name for name, _ in model.named_modules()]
    return [
        entry
        for entry in LEFT_ALONE
        if any(
            re.match(entry[3:], name) if _is_expression(entry) else name == entry for name in names
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


def linear_schemes(
    modifiers: Iterable[Any], model: torch.nn.Module
) -> dict[str, QuantizationScheme]:
    """The scheme that each Linear of some modifiers gets, by name.

    Of several targets that match a Linear the one with its name goes first, then regular
    expressions, then classes, whatever their order in the recipe.
    """
    found: dict[str, QuantizationScheme] = {}
    for modifier in modifiers:
        groups = modifier.resolved_config.config_groups.values()
        by_target = {target: scheme for scheme in groups for target in scheme.targets}
        found |= {
            name: by_target[match_targets(name, module, by_target)[0]]
            for name, module in match_named_modules(model, by_target, modifier.ignore)
            if isinstance(module, torch.nn.Linear)
        }
    return found


def check_targets(modifier: Any, model: Any) -> dict[str, int]:
    """Check that targets and ignored entries say what somebody who wrote them would expect.

    :param modifier: one that quantizes
    :param model: its shapes are enough (meta device)
    :return: input widths of the Linears it quantizes
    :raises UserError: when nothing is targeted, or modules that text does not go through (a vision
        tower); when a target or an ignored entry names no module, an ignored one only what is
        around quantized ones, a group is left with nothing, or a Linear could be of two groups;
        and for a quantized cache of attention that is ignored
    """
    _check_ignore(model, modifier)
    _check_cache(model, modifier)
    targeted = linear_widths(model, modifier.resolved_targets, modifier.ignore)
    if not targeted:
        raise UserError(
            f"the recipe's targets {sorted(modifier.resolved_targets)} match no Linear of the "
            "model: use targets: [Linear]"
        )
    _check_groups(model, modifier)
    reached = _reached_by_text(model)
    unreached = [name for name in targeted if name not in reached]
    if unreached:
        raise UserError(
            f"the recipe quantizes {len(unreached)} Linears that text does not go through, first "
            f"{unreached[0]}: add 're:{_branch(unreached[0], reached)}.*' to its ignore list"
        )
    return targeted


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


def unlike_siblings(modifiers: list[Any], model: torch.nn.Module) -> str | None:
    """The first Linears that vLLM would make one of and that differ in scheme, in words."""
    schemes = linear_schemes(modifiers, model)
    for parent, module in model.named_modules():
        for fused in FUSED:
            kinds = [kind for kind in fused if hasattr(module, kind)]
            given = [schemes.get(f"{parent}.{kind}") for kind in kinds]
            plain = [None if s is None else s.model_dump(exclude={"targets"}) for s in given]
            if any(one != plain[0] for one in plain[1:]):
                return f"{', '.join(kinds)} of {parent}"
    return None


def _check_groups(model: Any, modifier: Any) -> None:
    owner: dict[str, str] = {}
    for group, scheme in modifier.resolved_config.config_groups.items():
        for target in scheme.targets:
            if owner.setdefault(target, group) != group:
                raise UserError(
                    f"the recipe's {owner[target]} and {group} both target {target!r}: leave it "
                    "to one"
                )
            if not _is_expression(target) and not any(match_named_modules(model, [target])):
                raise UserError(
                    f"the recipe's {group} targets {target!r}, which is no module or class of the "
                    "model: mend the name or leave it out"
                )
    used = set()
    for name, module in match_named_modules(model, owner, modifier.ignore):
        first, *others = match_targets(name, module, owner)
        used.add(owner[first])
        for other in others:
            # a name beside an expression, either beside a class: that is how exceptions are said
            alike = (_is_expression(other), other == name) == (_is_expression(first), first == name)
            if alike and owner[other] != owner[first]:
                raise UserError(
                    f"{name} is in {owner[first]} by {first!r} and in {owner[other]} by {other!r}: "
                    "narrow one of them"
                )
    for group, scheme in modifier.resolved_config.config_groups.items():
        if group not in used:
            raise UserError(
                f"the recipe's {group} has nothing to quantize: what its targets {scheme.targets} "
                "match is ignored or of another group, or there is none: mend them or leave it out"
            )


def _check_cache(model: Any, modifier: Any) -> None:
    if modifier.kv_cache_scheme is None:
        return
    attention = {name for name, _ in match_named_modules(model, KV_CACHE_TARGETS)}
    kept = {name for name, _ in match_named_modules(model, KV_CACHE_TARGETS, modifier.ignore)}
    ignored = sorted((attention - kept) & _reached_by_text(model))
    if ignored:
        inside = rf"re:.*{ignored[0].rpartition('.')[2]}\..*"
        raise UserError(
            f"the recipe quantizes the KV cache and ignores {ignored[0]}, whose scales nothing "
            f"would set: to leave its Linears alone, ignore '{inside}'"
        )


def _is_expression(target: str) -> bool:
    return target.startswith("re:")


def _check_ignore(model: Any, modifier: Any) -> None:
    """Regular expressions may match nothing: recipes for several models have some."""
    targeted = {name for name, _ in match_named_modules(model, modifier.resolved_targets)}
    around = _above(targeted) - targeted
    for entry in modifier.ignore:
        if _is_expression(entry):
            continue
        named = [name for name, _ in match_named_modules(model, [entry])]
        if not named:
            raise UserError(
                f"the recipe ignores {entry!r}, which is no module of the model: mend the name or "
                "leave it out"
            )
        if targeted.isdisjoint(named) and not around.isdisjoint(named):
            inside = re.escape(entry) if entry in named else rf".*\.{named[0].rpartition('.')[2]}"
            raise UserError(
                f"the recipe ignores {entry!r}, which is not quantized itself, and not what is in "
                f"it, which is: ignore 're:{inside}\\.' instead"
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
