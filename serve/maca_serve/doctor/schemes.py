"""Which quantization arguments a config gives each module."""

import re
from collections.abc import Callable
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.doctor.layouts import Inputs, Scheme

SchemeOf = Callable[[str], Scheme | None]


def scheme_finder(quantization: dict[str, Any]) -> SchemeOf | None:
    """A function from module name to scheme (None: not quantized), or None for unknown methods.

    Args:
        quantization: the `quantization_config` of a model's config.

    Raises:
        UserError: a config of a known method that lacks what the method needs.
    """
    method = str(quantization.get("quant_method", "")).lower()
    try:
        if method == "compressed-tensors":
            return _compressed_tensors(quantization)
        if method in ("gptq", "awq") or (method == "auto-round" and _is_integer(quantization)):
            return _one_scheme(method, quantization)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(
            f"quantization_config: not a {method} config: {type(error).__name__} {error};"
            " compare it with what its tool writes"
        ) from error
    return None


def _inputs(group: dict[str, Any]) -> Inputs | None:
    """How a config group of compressed-tensors rounds activations, None where it does not."""
    given = group.get("input_activations")
    if not given:
        return None
    return Inputs(
        bits=int(given["num_bits"]),
        kind=str(given.get("type", "int")),
        strategy=str(given.get("strategy") or "tensor"),
        symmetric=bool(given.get("symmetric", True)),
        static=given.get("dynamic", False) is False,
    )


def _compressed_tensors(quantization: dict[str, Any]) -> SchemeOf:
    ignored = quantization.get("ignore") or []
    groups = [
        (group["targets"], _from_group(group, quantization.get("format")))
        for group in quantization["config_groups"].values()
        if group.get("weights")
    ]

    # A name or an expression is meant before a class of modules, as in vLLM.
    named = [(target, scheme) for targets, scheme in groups for target in targets]
    general = [scheme for target, scheme in named if _is_class(target)]

    def find(module: str) -> Scheme | None:
        if any(_matches(pattern, module) for pattern in ignored):
            return None
        found = (scheme for target, scheme in named if _matches(target, module))
        return next(found, general[0] if general else None)

    return find


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors: `re:` expressions match from the start, the rest is a name."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module


def _from_group(group: dict[str, Any], default_format: str | None) -> Scheme:
    weights = group["weights"]
    block = weights.get("block_structure")
    size = weights.get("group_size")
    return Scheme(
        format=str(group.get("format") or default_format),
        bits=int(weights["num_bits"]),
        group_size=size if size and size > 0 else None,
        strategy=str(weights.get("strategy") or ("group" if size else "tensor")),
        symmetric=bool(weights.get("symmetric", True)),
        kind=str(weights.get("type", "int")),
        block=(block[0], block[1]) if block else None,
        inputs=_inputs(group),
        actorder=weights.get("actorder") or None,
    )


def _one_scheme(method: str, quantization: dict[str, Any]) -> SchemeOf:
    rules = _rules(quantization)
    skipped = quantization.get("modules_to_not_convert") or []

    def find(module: str) -> Scheme | None:
        # As vLLM: the entries are parts of names.
        if any(part in module for part in skipped):
            return None
        values: dict[str, Any] = dict(quantization)
        for pattern, change in rules:
            if re.search(pattern, module):
                if change is None:
                    return None
                values |= change
        if int(_first(values, "bits", "w_bit")) >= 16:
            return None
        return _from_values(method, values)

    find("")  # so that a config without bits is refused before any module is asked for
    return find


def _is_integer(quantization: dict[str, Any]) -> bool:
    """Whether AutoRound packed integers, in AutoGPTQ's or AutoAWQ's way."""
    packing = quantization.get("packing_format") or "auto_round:auto_gptq"
    return packing in ("auto_round:auto_gptq", "auto_round:auto_awq")


def _rules(quantization: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
    """Overrides by expression: GPTQModel's `dynamic` and AutoRound's `extra_config`."""
    rules: list[tuple[str, dict[str, Any] | None]] = []
    for pattern, change in (quantization.get("dynamic") or {}).items():
        rules.append(
            (f"^(?:{pattern[2:]})", None) if pattern.startswith("-:") else _rule(pattern, change)
        )
    for pattern, change in (quantization.get("extra_config") or {}).items():
        rules.append((f"^(?:{pattern})$", change))
    return rules


def _rule(pattern: str, change: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return f"^(?:{pattern.removeprefix('+:')})", change


def _from_values(method: str, values: dict[str, Any]) -> Scheme:
    size = int(_first(values, "group_size", "q_group_size"))
    awq = method == "awq" or "awq" in str(values.get("packing_format", ""))
    asymmetric = (
        values.get("zero_point") if awq and "zero_point" in values else not values.get("sym", True)
    )
    return Scheme(
        format="awq" if awq else "gptq",
        bits=int(_first(values, "bits", "w_bit")),
        group_size=size if size > 0 else None,
        strategy="group" if size > 0 else "channel",
        symmetric=not asymmetric,
        actorder="group" if values.get("desc_act") else None,
        zero_offset=0 if awq or values.get("checkpoint_format") == "gptq_v2" else 1,
    )


def _first(values: dict[str, Any], *names: str) -> Any:
    for name in names:
        if values.get(name) is not None:
            return values[name]
    raise KeyError(names[0])
