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
from maca_llmc.recipe.containers import CONTAINER_BITS, check_container
from maca_llmc.recipe.reading import default_recipe, quantizing_modifiers, read_recipe
from maca_llmc.recipe.schemes import check_schemes
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


def prepare(
    output: str | Path,
    *,
    model: str = defaults.MODEL,
    recipe: str | Path | None = None,
    data: Any = None,
    scales: Sequence[int] | None = None,
    tokens: int = defaults.TOKENS,
    balance: str = "tokens",
    whole_documents: bool = False,
    text_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
    batch_tokens: int | None = None,
    cache_gb: float | None = None,
    seed: int = 0,
    device: str = "auto",
    container: int | None = None,
    allow_unfused: bool = False,
    record_diagonals: bool = False,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Check all that can be checked before the weights are loaded, and decide the rest.

    :param output: folder to make; a run that fails or is interrupted leaves none
    :param model: the embedded model's name, a folder, or a hub name
    :param recipe: YAML file; by default W4A16 by MaCa, with a group size that divides the widths
    :param data: text, JSONL, folder, hub name or ``Dataset``; the shipped English sample if None
    :param scales: calibration lengths in tokens; by default ``defaults.SCALES`` up to the context
    :param tokens: calibration budget
    :param balance: "tokens" or "counts": what every scale gets the same of
    :param whole_documents: documents at their natural length instead of windows
    :param text_column: of the data; so ``split`` and ``config_name`` of a hub data set
    :param batch_tokens: tokens that go through a layer together, in sequences of one length;
        ``defaults.BATCH_TOKENS`` of the device if None
    :param cache_gb: hidden states to hold in memory, the rest going to disk; half of what is free
        if None
    :param seed: of the order of the data; recorded
    :param device: "auto", "cpu", "cuda" or "cuda:N"
    :param container: 4 stores 2- and 3-bit weights in 4-bit containers, same values
    :param allow_unfused: let Linears that vLLM makes one of (q, k and v; gate and up; experts) have
        schemes of their own, for readers other than vLLM
    :param record_diagonals: write the Hessian's diagonal of a few modules, by length, beside the
        checkpoint (``maca_diagonals.json``), for the report of ``maca-serve compare``
    :param overwrite: replace ``output``, a checkpoint of ours, when the new one is complete
    :param resume: go on after the last layer that a killed run of the same settings finished
    :raises UserError: for anything the user can mend; nothing is written
    """
    check_output(resolve_output(output), (model, data), overwrite, resume)
    if container not in (None, CONTAINER_BITS):
        raise UserError(f"--container {container}: only {CONTAINER_BITS} is supported")
    if cache_gb is not None and cache_gb < 0:
        raise UserError(f"--cache-gb {cache_gb:g}: give 0 or more")
    parsed = read_recipe(recipe) if recipe is not None else None
    target = resolve_device(device)
    compute_on(target)
    if batch_tokens is None:
        batch_tokens = defaults.BATCH_TOKENS.get(target.type, defaults.BATCH_TOKENS["cpu"])

    source = loading.resolve_model(str(model))
    config = loading.load_config(source)
    shapes = loading.meta_model(config)
    tensors = base_weights.read_headers(source)
    base_weights.check_sizes(source, tensors, shapes)
    parsed = parsed or default_recipe(shapes)
    modifiers = quantizing_modifiers(parsed)
    for modifier in modifiers:
        check_schemes(modifier, shapes)
    check_overlap(modifiers, shapes)
    if record_diagonals and not isinstance(modifiers[0], MaCaModifier):
        raise UserError("--record-diagonals: no MaCaModifier in the recipe records them: drop it")
    if not allow_unfused and (unlike := unlike_siblings(modifiers, shapes)):
        raise UserError(
            f"{unlike} have different schemes: {UNFUSED}, or --allow-unfused for other readers"
        )
    if container:
        check_container(s for m in modifiers for s in m.resolved_config.config_groups.values())
    context = loading.context_length(config)
    if scales is None and not whole_documents:
        scales = [scale for scale in defaults.SCALES if context is None or scale <= context]
        if not scales:
            raise UserError(
                f"the model's context ({context}) is shorter than the shortest usual calibration "
                f"length ({defaults.SCALES[0]}): give --scales"
            )
    tokenizer = loading.load_tokenizer(source)
    calibration = build_calibration_set(
        tokenizer,
        source=data,
        scales=scales,
        tokens=tokens,
        balance=balance,
        whole_documents=whole_documents,
        seed=seed,
        max_context=context,
        text_column=text_column,
        split=split,
        config_name=config_name,
    )
    rows = shapes.get_input_embeddings().weight.shape[0]
    check_ids((ids.tolist() for ids in calibration.sequences), tokenizer, rows, source)
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
            inspected_modules(names) if record_diagonals else (), scales or defaults.SCALES
        ),
        device=target,
        batch_tokens=batch_tokens,
        cache_bytes=None if cache_gb is None else int(cache_gb * 1e9),
        container=container,
    )
