"""What the targets and the ignore list of a recipe name in a model."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import KV_CACHE_TARGETS
from compressed_tensors.utils import match_named_modules, match_targets
from loguru import logger

from maca_llmc.common.errors import CalibrationError
from maca_llmc.llmcompressor_api import decoder_layers

LEFT_ALONE = (
    "lm_head",
    r"re:.*(vision|visual|audio).*",
    r"re:.*multi_modal_projector.*",
    r"re:.*mlp\.gate$",
    r"re:.*mlp\.gate\.wg$",
    r"re:.*router.*",
    r"re:.*\.shared_expert_gate$",
    r"re:.*\.indexer\.(wk|weights_proj)$",
)
"""What stays unquantized by default: output head, other modalities, and what vLLM builds without a
quantization config: routers and gates of experts, two Linears of DeepSeek's sparse attention."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Linears of one input that vLLM makes one of, in the models that have them by these names."""

UNFUSED = "vLLM makes one of them and wants one scheme for all: give them one, or ignore all"
"""What is wrong with unlike schemes of :data:`FUSED` parts, and the cure."""

EXPERTS = re.compile(r"(.*\bexperts)\.\d+\.")
"""What stands before the number of an expert: vLLM makes one of all of them."""


LEAST_WIDTH = 16
"""Linears of fewer inputs or outputs stay as they are: no kernel of vLLM's takes them."""


def default_ignore(model: torch.nn.Module) -> list[str]:
    """The entries of ``LEFT_ALONE`` that match anything in ``model``, and more that stays as it is.

    That is Linears outside the decoder layers, to which no layer's calibration comes, Linears of
    fewer than ``LEAST_WIDTH`` inputs or outputs (both in Gemma 3n), Linears of a kind of their own,
    and first-generation Mamba mixers, which vLLM builds without a quantization config (Jamba).
    """
    names = [name for name, _ in model.named_modules()]
    ignored = [
        entry
        for entry in (*LEFT_ALONE, *_mamba_mixers(names))
        if any(
            re.match(entry[3:], name) if _is_expression(entry) else name == entry for name in names
        )
    ]
    inside = {module for layer in decoder_layers(model) for module in layer.modules()}
    others = [
        name if module in inside and not _is_small(module) else by_end(name)
        for name, module in match_named_modules(model, ["Linear"], ignored)
        if module not in inside or not _is_plain(module) or _is_small(module)
    ]
    return ignored + list(dict.fromkeys(others))


def by_end(name: str) -> str:
    """An expression for the end of a module's name; vLLM puts some modules elsewhere (Gemma 3n)."""
    parts = name.split(".")
    start = max(index for index, part in enumerate(parts) if not part.isdigit())
    end = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts[start:])
    return rf"re:(.*\.)?{end}$"


def _is_small(module: Any) -> bool:
    return min(module.in_features, module.out_features) < LEAST_WIDTH


def _mamba_mixers(names: list[str]) -> list[str]:
    """Expressions for the Linears of mixers that have an ``x_proj``, as only the first kind has."""
    mixers = {name.split(".")[-2] for name in names if re.search(r"\.layers\..*\.x_proj$", name)}
    return [rf"re:.*\.{mixer}\.(in|x|dt|out)_proj$" for mixer in sorted(mixers)]


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


def check_targets(modifier: Any, model: Any, text_only: bool = True) -> dict[str, int]:
    """Check that targets and ignored entries say what somebody who wrote them would expect.

    An expression of the ignore list that matches nothing is named in a warning only: recipes for
    several models have some.

    :param modifier: one that quantizes
    :param model: its shapes are enough (meta device)
    :param text_only: calibration is on text
    :return: input widths of the Linears it quantizes
    :raises CalibrationError: when nothing is targeted, an embedding is, or modules that text does
        not go through (a vision tower); when a target or an ignored entry names no module, an
        ignored one only what is around quantized ones, a group is left with nothing, or a Linear
        could be of two groups; and for a quantized cache of attention that is ignored
    """
    _check_ignore(model, modifier)
    _check_names(model, modifier)
    _check_cache(model, modifier)
    targeted = linear_widths(model, modifier.resolved_targets, modifier.ignore)
    if not targeted:
        raise CalibrationError(_why_nothing(model, modifier))
    _check_groups(model, modifier)
    _check_embeddings(model, modifier)
    if text_only:
        _check_reached(model, targeted)
    for name in targeted:
        if not _is_plain(module := model.get_submodule(name)):
            raise CalibrationError(
                f"{name} is a {type(module).__name__}, a Linear of its own kind, which cannot be "
                f"written quantized: add {name!r} to the recipe's ignore list"
            )
    return targeted


def check_overlap(modifiers: list[Any], model: Any) -> None:
    """Check that no two modifiers quantize one Linear.

    :raises CalibrationError: names it; llm-compressor would let the later one have it
    """
    owner: dict[str, Any] = {}
    for modifier in modifiers:
        for name in linear_widths(model, modifier.resolved_targets, modifier.ignore):
            first = type(owner.setdefault(name, modifier)).__name__
            if owner[name] is not modifier:
                raise CalibrationError(
                    f"{name} is quantized by {first} and by {type(modifier).__name__}: narrow the "
                    "targets of one, or add it to its ignore list"
                )


def unlike_siblings(modifiers: list[Any], model: torch.nn.Module) -> str | None:
    """The first Linears that vLLM would make one of and that differ in scheme, in words."""
    schemes = linear_schemes(modifiers, model)
    plain = {name: scheme.model_dump(exclude={"targets"}) for name, scheme in schemes.items()}
    for words, names in _fused_parts(model):
        first, *others = (plain.get(name) for name in names)
        if any(other != first for other in others):
            return words
    return None


def _fused_parts(model: torch.nn.Module) -> Iterator[tuple[str, list[str]]]:
    """What vLLM makes one of: in words, and the names of its parts."""
    experts: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for fused in FUSED:
            kinds = [kind for kind in fused if hasattr(module, kind)]
            if len(kinds) > 1:
                yield f"{', '.join(kinds)} of {name}", [f"{name}.{kind}" for kind in kinds]
        match = EXPERTS.match(name)
        if match and isinstance(module, torch.nn.Linear):
            experts.setdefault(match[1], []).append(name)
    for name, parts in experts.items():
        yield f"parts of {name}", parts


def _check_embeddings(model: Any, modifier: Any) -> None:
    """Refuse embeddings, to which no calibration pass and no solve comes."""
    targets, ignore = modifier.resolved_targets, modifier.ignore
    for name, module in match_named_modules(model, targets, ignore):
        if isinstance(module, torch.nn.Embedding):
            raise CalibrationError(
                f"the recipe quantizes {name}, an embedding, which is not done here: take it out "
                f"of the targets, or add {name} to the ignore list"
            )


def _check_reached(model: Any, targeted: Iterable[str]) -> None:
    reached = _reached_by_text(model)
    unreached = [name for name in targeted if name not in reached]
    if unreached:
        raise CalibrationError(
            f"the recipe quantizes {len(unreached)} Linears that text does not go through, first "
            f"{unreached[0]}: add 're:{_branch(unreached[0], reached)}.*' to its ignore list"
        )


def _check_names(model: Any, modifier: Any) -> None:
    """Expressions may match nothing."""
    for group, scheme in modifier.resolved_config.config_groups.items():
        for target in scheme.targets:
            if not _is_expression(target) and not any(match_named_modules(model, [target])):
                raise CalibrationError(
                    f"the recipe's {group} targets {target!r}, which is no module or class of the "
                    f"model: {_mended(model, target)}"
                )


def _check_groups(model: Any, modifier: Any) -> None:
    owner: dict[str, str] = {}
    for group, scheme in modifier.resolved_config.config_groups.items():
        for target in scheme.targets:
            if owner.setdefault(target, group) != group:
                raise CalibrationError(
                    f"the recipe's {owner[target]} and {group} both target {target!r}: leave it "
                    "to one"
                )
    used = set()
    for name, module in match_named_modules(model, owner, modifier.ignore):
        first, *others = match_targets(name, module, owner)
        used.add(owner[first])
        for other in others:
            # a name beside an expression, either beside a class: that is how exceptions are said
            alike = (_is_expression(other), other == name) == (_is_expression(first), first == name)
            if alike and owner[other] != owner[first]:
                raise CalibrationError(
                    f"{name} is in {owner[first]} by {first!r} and in {owner[other]} by {other!r}: "
                    "narrow one of them"
                )
    for group, scheme in modifier.resolved_config.config_groups.items():
        if group not in used:
            raise CalibrationError(
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
        raise CalibrationError(
            f"the recipe quantizes the KV cache and ignores {ignored[0]}, whose scales nothing "
            f"would set: to leave its Linears alone, ignore '{inside}'"
        )


def _is_plain(module: torch.nn.Module) -> bool:
    """compressed-tensors writes subclasses of Linear as they are, and promises codes."""
    return type(module) is torch.nn.Linear


def _why_nothing(model: Any, modifier: Any) -> str:
    """What is wrong with a recipe that quantizes no Linear, and the cure."""
    modules = [pair for layer in decoder_layers(model) for pair in layer.named_modules()]
    if not any(isinstance(module, torch.nn.Linear) for _, module in modules):
        kinds = {type(m).__name__ for _, m in modules if getattr(m, "weight", None) is not None}
        kinds = {kind for kind in kinds if "norm" not in kind.lower()}
        return (
            f"the model's layers have no Linear ({', '.join(sorted(kinds)) or 'no weights'} in "
            "their place), and only Linears are quantized: take another model"
        )
    if linear_widths(model, modifier.resolved_targets, []):
        return "the recipe's ignore list leaves nothing of its targets to quantize: shorten it"
    targets = sorted(modifier.resolved_targets)
    return f"the recipe's targets {targets} match no Linear of the model: use targets: [Linear]"


def _mended(model: torch.nn.Module, name: str) -> str:
    """What to do about a name that is none: most often it is the end of one."""
    if any(f".{path}".endswith(f".{name}") for path, _ in model.named_modules()):
        return f"write 're:.*{re.escape(name)}$'"
    return "mend the name or leave it out"


def _is_expression(target: str) -> bool:
    return target.startswith("re:")


def _check_ignore(model: Any, modifier: Any) -> None:
    targeted = {name for name, _ in match_named_modules(model, modifier.resolved_targets)}
    around = _above(targeted) - targeted
    for entry in modifier.ignore:
        named = [name for name, _ in match_named_modules(model, [entry])]
        if _is_expression(entry):
            if not named:
                logger.warning(f"the recipe ignores {entry!r}, which matches nothing in the model")
            continue
        if not named:
            raise CalibrationError(
                f"the recipe ignores {entry!r}, which is no module of the model: "
                f"{_mended(model, entry)}"
            )
        if targeted.isdisjoint(named) and not around.isdisjoint(named):
            inside = re.escape(entry) if entry in named else rf".*\.{named[0].rpartition('.')[2]}"
            raise CalibrationError(
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
