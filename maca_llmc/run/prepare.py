"""Check all that can be checked before the weights are loaded, and decide the rest."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from maca_llmc.calibrate.full_precision import asymmetric_modifiers
from maca_llmc.calibrate.hidden_states import waiting_place
from maca_llmc.common import defaults
from maca_llmc.common.device import compute_on, resolve_device
from maca_llmc.common.errors import UserError
from maca_llmc.data import CalibrationSet, build_calibration_set
from maca_llmc.data.calibration import check_ids
from maca_llmc.llmcompressor_api import Recipe
from maca_llmc.model import base_weights, loading
from maca_llmc.modifier import MaCaModifier
from maca_llmc.options import QuantizeOptions
from maca_llmc.recipe.containers import CONTAINER_BITS, check_container
from maca_llmc.recipe.reading import (
    DEFAULT_SCHEME,
    quantizing_modifiers,
    read_recipe,
    scheme_recipe,
)
from maca_llmc.recipe.schemes import check_schemes, check_tunable
from maca_llmc.recipe.targets import UNFUSED, check_overlap, linear_widths, unlike_siblings
from maca_llmc.run.diagonals import DiagonalRecorder, inspected_modules
from maca_llmc.run.output import check_output, resolve_output


@dataclass
class Run:
    """What a quantize run has decided and measured so far.

    :param shapes: the model without weights
    :param modifiers: of the recipe, those that quantize, the ones with Hessians first
    :param processor_files: of the base, to copy
    :param draft_layers: of the base, which the result lacks: where they are, how many tensors each
    :param batch_tokens: tokens that go through a layer together
    :param cache_bytes: hidden states held in memory; None for half of what is free
    :param dropped: all of the base's that the checkpoint lacks, as ``draft_layers``
    """

    source: str
    config: Any
    shapes: Any
    recipe: Recipe
    modifiers: list[Any]
    calibration: CalibrationSet
    tokenizer: Any
    processor_files: list[Path]
    draft_layers: dict[str, int]
    recorder: DiagonalRecorder
    device: torch.device
    batch_tokens: int
    cache_bytes: int | None
    container: int | None
    losses: dict[str, float] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    spilled_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def modifier(self) -> Any:
        """The one that the run is about: MaCa, where the recipe has it."""
        return self.modifiers[0]

    @property
    def hidden_place(self) -> torch.device:
        """Where hidden states wait for the next layer; GPTAQ keeps more of them than fits."""
        if self.cache_bytes is not None or asymmetric_modifiers(self.modifiers):
            return torch.device("cpu")
        config = self.config.get_text_config()
        size = (config.dtype or torch.bfloat16).itemsize
        return waiting_place(self.device, sum(self.calibration.lengths) * config.hidden_size * size)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the wall time of a phase, in seconds."""
        start = time.perf_counter()
        yield
        self.wall_seconds[phase] = round(time.perf_counter() - start, 3)


def prepare(output: str | Path | None, options: QuantizeOptions) -> Run:
    """Check all that can be checked before the weights are loaded, and decide the rest.

    :param output: folder to make; None where none is to be made
    :raises UserError: for anything the user can mend; nothing is written
    """
    if output is not None:
        inputs = options.model, options.data
        check_output(resolve_output(output), inputs, options.overwrite, options.resume)
    _check_values(options)
    parsed = read_recipe(options.recipe) if options.recipe is not None else None
    device = resolve_device(options.device)
    compute_on(device)
    source = loading.resolve_model(str(options.model))
    config = loading.load_config(source)
    shapes = loading.meta_model(config)
    tensors = base_weights.read_headers(source)
    base_weights.check_sizes(source, tensors, shapes)
    parsed = parsed or scheme_recipe(shapes, options.scheme or DEFAULT_SCHEME)
    modifiers = quantizing_modifiers(parsed)
    _check_modifiers(modifiers, shapes, options)
    context = loading.context_length(config)
    lengths = _lengths(options, context)
    tokenizer = loading.load_tokenizer(source)
    calibration = build_calibration_set(
        tokenizer,
        source=options.data,
        scales=lengths,
        tokens=options.tokens,
        balance=str(options.balance),
        whole_documents=options.whole_documents,
        seed=options.seed,
        max_context=context,
        text_column=options.text_column,
        split=options.split,
        config_name=options.config_name,
    )
    rows = shapes.get_input_embeddings().weight.shape[0]
    check_ids((ids.tolist() for ids in calibration.sequences), tokenizer, rows, source)
    batch_tokens = options.batch_tokens
    if batch_tokens is None:
        batch_tokens = defaults.BATCH_TOKENS.get(device.type, defaults.BATCH_TOKENS["cpu"])
    calibration.dataloader(batch_tokens)  # refuses a size that makes no sense
    names = list(linear_widths(shapes, modifiers[0].resolved_targets, modifiers[0].ignore))
    return Run(
        source=source,
        config=config,
        shapes=shapes,
        recipe=parsed,
        modifiers=modifiers,
        calibration=calibration,
        tokenizer=tokenizer,
        processor_files=loading.processor_files(source),
        draft_layers=base_weights.draft_layers(tensors, config),
        recorder=DiagonalRecorder(
            inspected_modules(names) if options.record_diagonals else (),
            lengths or defaults.SCALES,
        ),
        device=device,
        batch_tokens=batch_tokens,
        cache_bytes=None if options.cache_gb is None else int(options.cache_gb * 1e9),
        container=options.container,
    )


def _check_values(options: QuantizeOptions) -> None:
    if options.recipe is not None and options.scheme is not None:
        raise UserError(f"--recipe {options.recipe} and --scheme {options.scheme}: give one")
    if options.container not in (None, CONTAINER_BITS):
        raise UserError(f"--container {options.container}: only {CONTAINER_BITS} is supported")
    if options.cache_gb is not None and options.cache_gb < 0:
        raise UserError(f"--cache-gb {options.cache_gb:g}: give 0 or more")
    if options.tune_tokens is not None and options.tune is None:
        raise UserError(f"--tune-tokens {options.tune_tokens}: give --tune light or full with it")


def _check_modifiers(modifiers: list[Any], shapes: Any, options: QuantizeOptions) -> None:
    for modifier in modifiers:
        check_schemes(modifier, shapes)
    check_overlap(modifiers, shapes)
    if options.record_diagonals and not isinstance(modifiers[0], MaCaModifier):
        raise UserError("--record-diagonals: no MaCaModifier in the recipe records them: drop it")
    if not options.allow_unfused and (unlike := unlike_siblings(modifiers, shapes)):
        raise UserError(
            f"{unlike} have different schemes: {UNFUSED}, or --allow-unfused for other readers"
        )
    schemes = [s for m in modifiers for s in m.resolved_config.config_groups.values()]
    if options.container:
        check_container(schemes)
    if options.tune:
        check_tunable(schemes)


def _lengths(options: QuantizeOptions, context: int | None) -> Sequence[int] | None:
    """Calibration lengths; None for whole documents."""
    if options.lengths is not None or options.whole_documents:
        return options.lengths
    lengths = [length for length in defaults.SCALES if context is None or length <= context]
    if not lengths:
        raise UserError(
            f"the model's context ({context}) is shorter than the shortest usual calibration "
            f"length ({defaults.SCALES[0]}): give --lengths"
        )
    return lengths
