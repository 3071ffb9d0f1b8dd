"""Read a recipe file strictly, or make the default one."""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationType,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from pydantic import ValidationError

from maca_llmc.common.errors import UserError
from maca_llmc.llmcompressor_api import (
    GPTQModifier,
    QuantizationMixin,
    Recipe,
    Sentinel,
)
from maca_llmc.modifier import MaCaModifier
from maca_llmc.recipe.schemes import check_arguments, check_order, dividing_group_sizes
from maca_llmc.recipe.targets import default_ignore, linear_widths

DEFAULT_SCHEME = "W4A16"


def read_recipe(path: str | Path) -> Recipe:
    """Parse a YAML recipe; unlike llm-compressor, refuse what would be dropped silently.

    :raises UserError: for a file that is missing, broken or parses to no modifier, a stage or
        group key with the wrong ending, an unknown modifier or an unknown or wrong field
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe {path} is no file: see recipes/ in the checkout, or give --scheme")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _NoRepeats)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {_one_line(error)}") from error
    _check_structure(path, content)
    _check_expressions(path, content)
    try:
        recipe = Recipe.create_instance(str(path))
        for modifier in recipe.modifiers:
            if isinstance(modifier, QuantizationMixin):
                check_arguments(modifier)
        check_order(recipe.modifiers)
        return recipe
    except ValidationError as error:
        raise UserError(f"recipe {path}: {_first_problem(error)}") from error
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        cure = " Use MaCaModifier, GPTQModifier or another of llm-compressor's."
        unknown = str(error).startswith("No modifier of type")
        raise UserError(f"recipe {path}: {_one_line(error)}{cure if unknown else ''}") from error


class _NoRepeats(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice{node.start_mark}: keep one")
        return dict(super().construct_mapping(node, deep=deep))


def _check_expressions(path: Path, content: Any) -> None:
    for text in _texts(content):
        if not text.startswith("re:"):
            continue
        try:
            re.compile(text.removeprefix("re:"))
        except re.error as error:
            raise UserError(
                f"recipe {path}: {text!r} is no regular expression: {error}: mend it"
            ) from error


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _texts(item)


def scheme_recipe(model: torch.nn.Module, scheme: str = DEFAULT_SCHEME) -> Recipe:
    """One scheme for every Linear, by MaCa.

    Groups of integers get the largest usual size that divides the model's widths; where none does,
    each row is a group.

    :param model: its shapes are enough (meta device)
    :param scheme: one of compressed-tensors' presets, in any case, with - or _
    :raises UserError: for any other, with those there are
    """
    ignore = default_ignore(model)
    groups = {"group_0": scheme_of(model, scheme, ignore)}
    return Recipe.from_modifiers(MaCaModifier(config_groups=groups, ignore=ignore))


def scheme_of(model: torch.nn.Module, name: str, ignore: list[str]) -> QuantizationScheme:
    """A preset of compressed-tensors for every Linear, see :func:`scheme_recipe`."""
    preset = name.upper().replace("-", "_")
    if preset not in PRESET_SCHEMES or preset == "UNQUANTIZED":
        names = ", ".join(each for each in PRESET_SCHEMES if each != "UNQUANTIZED")
        raise UserError(f"--scheme {name}: give one of {names}, or a --recipe")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.type == QuantizationType.INT and scheme.weights.group_size:
        sizes = dividing_group_sizes(linear_widths(model, ["Linear"], ignore).values())
        fields = scheme.weights.model_dump() | (
            {"group_size": sizes[0]} if sizes else {"strategy": "channel", "group_size": None}
        )
        scheme.weights = QuantizationArgs(**fields)
    return scheme


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Write ``recipe.yaml`` with all fields resolved, in plain YAML.

    llm-compressor's own dump holds Python tags for enumerations, which a safe loader refuses.
    """
    (folder / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")


def recipe_text(recipe: Recipe) -> str:
    """A recipe as plain YAML, fields resolved, that can be run again.

    Left out is what AWQ marks as not given, and what SpinQuant has resolved for the model at hand.
    A None that is not its field's default, such as no activation ordering, is kept.
    """
    content = recipe.to_dict()
    groups = [group for stage in content.values() for group in stage.values()]
    fields_of = {name: fields for group in groups for name, fields in group.items()}
    for modifier in recipe.modifiers:
        fields = fields_of[type(modifier).__name__]
        if getattr(modifier, "mappings", None) is not None:
            fields.pop("transform_config", None)
        fields |= dict.fromkeys(_meant_none(modifier))
    plain = json.loads(json.dumps(_without_marks(content), default=_named))
    return yaml.safe_dump(plain, sort_keys=False)


def _meant_none(modifier: Any) -> list[str]:
    fields = type(modifier).model_fields
    return [
        name
        for name in modifier.model_fields_set & fields.keys()
        if getattr(modifier, name) is None and fields[name].get_default() is not None
    ]


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_marks(v) for k, v in value.items() if not isinstance(v, Sentinel)}
    return [_without_marks(v) for v in value] if isinstance(value, list) else value


def _named(value: Any) -> str:
    if isinstance(value, torch.device):  # where AWQ keeps what goes into experts
        return str(value)
    raise TypeError(f"a recipe cannot hold {value!r}")


def quantizing_modifiers(recipe: Recipe) -> list[Any]:
    """The modifiers of a recipe that hold quantization schemes, those with Hessians first.

    :raises UserError: when there is none
    """
    found = [modifier for modifier in recipe.modifiers if isinstance(modifier, QuantizationMixin)]
    if not found:
        raise UserError("the recipe quantizes nothing: add a MaCaModifier or GPTQModifier")
    return sorted(found, key=lambda modifier: not isinstance(modifier, GPTQModifier))


def _check_structure(path: Path, content: Any) -> None:
    expected = "expected NAME_stage: {NAME_modifiers: {MaCaModifier: {...}}}"
    if not isinstance(content, dict) or not content:
        raise UserError(f"recipe {path} parses to nothing: {expected}")
    for stage, groups in content.items():
        if stage == "args":
            continue
        if not str(stage).endswith("_stage"):
            raise UserError(f"recipe {path}: key {stage!r} does not end in _stage: {expected}")
        if not isinstance(groups, dict):
            raise UserError(f"recipe {path}: {stage} holds no modifiers: {expected}")
        for group, modifiers in groups.items():
            if not str(group).endswith("_modifiers"):
                raise UserError(
                    f"recipe {path}: key {group!r} does not end in _modifiers: {expected}"
                )
            if not isinstance(modifiers, dict):
                raise UserError(f"recipe {path}: {group} holds no modifiers: {expected}")
            for name, fields in modifiers.items():
                if not isinstance(fields, dict):
                    raise UserError(f"recipe {path}: {name} has no fields: give it a scheme")
    stages = [groups for stage, groups in content.items() if stage != "args"]
    if not any(modifiers for groups in stages for modifiers in groups.values()):
        raise UserError(f"recipe {path} parses to no modifier: {expected}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown field {where!r} of {error.title}: {_right_field(problem['loc'])}"
    given = f" {problem['input']!r}" if isinstance(problem["input"], str | int | float) else ""
    message = problem["msg"].removeprefix("Value error, ")
    if "preset scheme name" in message:
        message += f" ({', '.join(PRESET_SCHEMES)})"
    return " ".join(f"{error.title}: {where}{given}: {message}".split())


def _right_field(where: tuple[int | str, ...]) -> str:
    """What was meant by a field that is unknown in its place."""
    name, known = str(where[-1]), set(MaCaModifier.model_fields)
    if len(where) > 1:  # in a scheme
        known = {*QuantizationScheme.model_fields, *QuantizationArgs.model_fields}
    if name in known:
        return "it is a field of MaCaModifier: give it there"
    near = get_close_matches(name, known, n=1)
    return f"is it {near[0]!r}?" if near else "check its spelling"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
