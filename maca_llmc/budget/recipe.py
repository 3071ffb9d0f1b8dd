"""A recipe that meets a budget: measure what every part costs, choose, and write it down."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme, QuantizationType

from maca_llmc.budget.choice import choose
from maca_llmc.budget.parts import Part, expressions, find_parts
from maca_llmc.budget.sensitivity import cost, watch
from maca_llmc.common import defaults
from maca_llmc.common.device import resolve_device
from maca_llmc.common.errors import UserError
from maca_llmc.common.progress import tell
from maca_llmc.data import build_calibration_set
from maca_llmc.evaluation.divergence import load_dequantized
from maca_llmc.model import loading
from maca_llmc.options import QuantizeOptions
from maca_llmc.recipe.reading import scheme_of
from maca_llmc.recipe.targets import default_ignore

TOKENS = 8192
"""Of calibration text, from which sensitivity is measured."""
BATCH_TOKENS = 2048
WHOLE = "BF16"
SIZE = re.compile(r"([\d.]+)\s*([KMGT]?)B", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A choice of schemes within a budget.

    :param recipe: content of a recipe file
    :param bits: a weight, over all that may be quantized, everything counted
    :param expected: KL to the base that rounding to nearest would cost, nats a token
    """

    recipe: dict[str, Any]
    bits: float
    expected: float


def with_budget_recipe(options: QuantizeOptions, folder: Path) -> QuantizeOptions:
    """Options with a recipe that meets their budget, written into a folder.

    :raises UserError: for a budget that nothing meets, or schemes that it does not take
    """
    if options.recipe is not None or options.scheme is not None:
        raise UserError("--bits and --size choose the schemes: drop --recipe and --scheme")
    if options.bits is not None and options.size is not None:
        raise UserError(f"--bits {options.bits:g} and --size {options.size}: give one")
    budget = plan_budget(options)
    path = folder / "budget.yaml"
    path.write_text(yaml.safe_dump(budget.recipe, sort_keys=False), encoding="utf-8")
    tell(
        f"budget: {budget.bits:.3f} bits a weight; rounding alone would cost "
        f"{budget.expected:.3g} nats a token, to second order"
    )
    return replace(options, recipe=path, bits=None, size=None, choose=None)


def plan_budget(options: QuantizeOptions) -> Budget:
    """Measure and choose; loads the model."""
    spending = Spending(options)
    budget = spending.bits_in_all(options)
    choose(np.zeros_like(spending.sizes), spending.sizes, budget)  # before the model is loaded
    return spending.spend(budget, spending.costs())


def frontier(options: QuantizeOptions, points: int = 12) -> list[tuple[float, float]]:
    """Bits a weight and what they would cost at best, nats a token, from the fewest to the most.

    Loads the model. Costs are those of rounding to nearest, to second order: compare them.
    """
    spending = Spending(options)
    costs = spending.costs()
    least, most = (f(spending.sizes, axis=1).sum() for f in (np.min, np.max))
    found = [spending.spend(budget, costs) for budget in np.linspace(least, most, points)]
    return [(budget.bits, budget.expected) for budget in found]


class Spending:
    """What bits can be spent on: the parts of a model, and schemes with what they take.

    :raises UserError: for a scheme that it does not take
    """

    def __init__(self, options: QuantizeOptions) -> None:
        self._options = options
        self._source = loading.resolve_model(str(options.model))
        self._config = loading.load_config(self._source)
        self._shapes = loading.meta_model(self._config)
        self._ignore = default_ignore(self._shapes)
        self.parts = find_parts(self._shapes, self._ignore)
        self.names = [n.strip().upper() for n in (options.choose or defaults.CHOICES).split(",")]
        self.schemes = [_scheme(self._shapes, name, self._ignore) for name in self.names]
        self.weights = sum(part.weights for part in self.parts)
        rows = [[p.bits(scheme and scheme.weights) for scheme in self.schemes] for p in self.parts]
        self.sizes = np.array(rows, float)

    def bits_in_all(self, options: QuantizeOptions) -> float:
        """The budget, for all that may be quantized."""
        return _budget(options, self._shapes, self._config, self.weights)

    def costs(self) -> Any:
        """Nats a token, ``[parts, schemes]``."""
        return _costs(self._options, self._source, self._config, self.parts, self.schemes)

    def spend(self, budget: float, costs: Any) -> Budget:
        """The best within a budget."""
        chosen, rows = choose(costs, self.sizes, budget), range(len(self.parts))
        return Budget(
            _recipe(self.parts, self.names, self.schemes, chosen, self._ignore),
            float(self.sizes[rows, chosen].sum() / self.weights),
            float(costs[rows, chosen].sum()),
        )


def _scheme(shapes: Any, name: str, ignore: list[str]) -> QuantizationScheme | None:
    if name == WHOLE:
        return None
    scheme = scheme_of(shapes, name, ignore)
    if scheme.weights.type != QuantizationType.INT or scheme.input_activations is not None:
        raise UserError(
            f"--choose {name}: a budget takes weights of integers (W2A16 to W8A16) and BF16"
        )
    return scheme


def _budget(options: QuantizeOptions, shapes: Any, config: Any, weights: int) -> float:
    """Bits for all that may be quantized."""
    if options.bits is not None:
        if options.bits <= 0:
            raise UserError(f"--bits {options.bits:g}: give bits a weight such as 4.25")
        return options.bits * weights
    size = str(options.size)
    match = SIZE.fullmatch(size.strip())
    if not match:
        raise UserError(f"--size {size}: give a size such as 5.2GB")
    given = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    head = shapes.get_output_embeddings() if tied else None
    left = {p for m in shapes.modules() if m is not head for p in m.parameters(recurse=False)}
    rest = sum(p.numel() * p.element_size() for p in left) - 2 * weights
    if given <= rest:
        raise UserError(
            f"--size {size}: what stays unquantized takes {rest / 1e6:.0f} MB already: raise it"
        )
    return 8 * (given - rest)


def _costs(
    options: QuantizeOptions,
    source: str,
    config: Any,
    parts: list[Part],
    schemes: list[QuantizationScheme | None],
) -> Any:
    model = load_dequantized(source, resolve_device(options.device))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    context = loading.context_length(config)
    windows = build_calibration_set(
        loading.load_tokenizer(source),
        source=options.data,
        scales=options.lengths or [n for n in defaults.SCALES if context is None or n <= context],
        tokens=min(options.tokens, TOKENS),
        seed=options.seed,
        max_context=context,
        text_column=options.text_column,
        split=options.split,
        config_name=options.config_name,
    ).sequences
    moments = watch(model, parts, list(windows), BATCH_TOKENS, options.seed)
    with torch.no_grad():
        return np.array(
            [
                [
                    sum(
                        cost(model.get_submodule(n).weight, s and s.weights, moments[n])
                        for n in part.names
                    )
                    for s in schemes
                ]
                for part in parts
            ]
        )


def _recipe(
    parts: list[Part],
    names: list[str],
    schemes: list[QuantizationScheme | None],
    chosen: list[int],
    ignore: list[str],
) -> dict[str, Any]:
    groups, left = {}, list(ignore)
    for index, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
        own = [part for part, number in zip(parts, chosen, strict=True) if number == index]
        targets = expressions(name for part in own for name in part.names)
        if scheme is None:
            left += targets
        elif targets:
            weights = scheme.weights.model_dump(mode="json", exclude_none=True)
            groups[name.lower()] = {"targets": targets, "weights": weights}
    fields = {"config_groups": groups, "ignore": left}
    return {"quantize_stage": {"quantize_modifiers": {"MaCaModifier": fields}}}
