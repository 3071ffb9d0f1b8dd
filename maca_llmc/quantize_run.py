"""The quantize run: check everything first, calibrate, save beside, rename."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot

from maca_llmc import defaults, models, pipeline, record, smollm2
from maca_llmc.containers import CONTAINER_BITS, check_container, widen_containers
from maca_llmc.data import CalibrationSet, build_calibration_set
from maca_llmc.device import resolve_device
from maca_llmc.errors import UserError
from maca_llmc.inspection import DiagonalRecorder, inspected_modules
from maca_llmc.llmcompressor_api import (
    Recipe,
    computing_on,
    decoder_layers,
    forget_causal_masks,
    keep_causal_masks,
    recorded_losses,
)
from maca_llmc.modifier import MaCaModifier
from maca_llmc.progress import layer_progress, log_warnings_once, quiet
from maca_llmc.recipes import default_recipe, quantizing_modifier, read_recipe, save_recipe
from maca_llmc.schemes import check_schemes, describe_scheme, linear_widths


@dataclass
class Run:
    """What a quantize run has decided and measured so far."""

    source: str
    config: Any
    recipe: Recipe
    modifier: Any
    calibration: CalibrationSet
    processor: Any
    recorder: DiagonalRecorder
    losses: dict[str, float] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the wall time of a phase, in seconds."""
        start = time.perf_counter()
        yield
        self.wall_seconds[phase] = round(time.perf_counter() - start, 3)


def quantize(
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
    batch_size: int = 1,
    seed: int = 0,
    device: str = "auto",
    container: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Quantize a model by a recipe and write a compressed-tensors checkpoint.

    :param output: folder to make; a run that fails or is interrupted leaves none
    :param model: the embedded model's name, a folder, or a hub name
    :param recipe: YAML file; by default W4A16 by MaCa, with a group size that divides the widths
    :param data: text, JSONL, folder, hub name or ``Dataset``; the shipped English sample if None
    :param scales: calibration lengths in tokens; by default ``defaults.SCALES`` up to the context
    :param tokens: calibration budget
    :param balance: "tokens" or "counts": what every scale gets the same of
    :param whole_documents: documents at their natural length instead of windows
    :param text_column: of the data; so ``split`` and ``config_name`` of a hub data set
    :param batch_size: sequences per batch, padded to the longest; 1 wastes nothing
    :param seed: of the order of the data; recorded
    :param device: "auto", "cpu", "cuda" or "cuda:N"
    :param container: 4 stores 2- and 3-bit weights in 4-bit containers, same values
    :param overwrite: replace ``output`` when the new checkpoint is complete
    :return: ``output``
    :raises UserError: for anything the user can mend, before anything is written
    """
    log_warnings_once()
    output = Path(output).expanduser().absolute()
    _check_output(output, overwrite)
    if container not in (None, CONTAINER_BITS):
        raise UserError(f"--container {container}: only {CONTAINER_BITS} is supported")
    parsed = read_recipe(recipe) if recipe is not None else None
    target = resolve_device(device)
    torch.manual_seed(seed)

    source = models.resolve_model(str(model))
    config = models.load_config(source)
    shapes = models.meta_model(config)
    parsed = parsed or default_recipe(shapes)
    modifier = quantizing_modifier(parsed)
    check_schemes(modifier, shapes)
    if container:
        check_container(modifier.resolved_config.config_groups.values())
    _check_disk(output, shapes)
    context = models.context_length(config)
    if scales is None and not whole_documents:
        scales = [scale for scale in defaults.SCALES if context is None or scale <= context]
    tokenizer = models.load_tokenizer(source)
    processor = models.load_processor(source, tokenizer)
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
    names = list(linear_widths(shapes, modifier.resolved_targets, modifier.ignore))
    recorder = DiagonalRecorder(inspected_modules(names), scales or defaults.SCALES)
    run = Run(source, config, parsed, modifier, calibration, processor, recorder)

    with _written_whole(output) as partial:
        quantized = _calibrate(run, batch_size, target)
        if container:
            widen_containers(quantized)
        with run.timed("save"), quiet():
            models.save_model(quantized, partial)
            processor.save_pretrained(partial)
            save_recipe(parsed, partial)
        _write_records(run, partial, output.name, container)
    return output


def _calibrate(run: Run, batch_size: int, device: torch.device) -> Any:
    with run.timed("load"), quiet():
        model = models.load_model(run.source, run.config)
    if isinstance(run.modifier, MaCaModifier):
        run.modifier.record_diagonals(run.recorder)
    loader = run.calibration.dataloader(batch_size)
    names = {module: name for name, module in model.named_modules()}
    keep_causal_masks(model.config)
    try:
        with (
            run.timed("calibrate"),
            computing_on(device),
            layer_progress(decoder_layers(model), len(loader)),
            recorded_losses(lambda module, loss: run.losses.update({names[module]: loss})),
        ):
            oneshot(
                model=model,
                processor=run.processor,
                dataset=loader,
                recipe=run.recipe,
                pipeline=pipeline.NAME,
            )
    finally:
        forget_causal_masks(model.config)
    return model


def _write_records(run: Run, folder: Path, name: str, container: int | None) -> None:
    schemes = [describe_scheme(s) for s in run.modifier.resolved_config.config_groups.values()]
    content = {
        "format": 1,
        "base_model": _public_name(run),
        "license": record.base_license(run.source),
        "scheme": "; ".join(schemes) + (f", in {container}-bit containers" if container else ""),
        "method": describe_method(run.modifier),
        "modifier": {
            "type": type(run.modifier).__name__,
            **run.modifier.model_dump(
                include={"length_exponent", "nested_scales", "dampening_frac", "block_size"}
            ),
        },
        "container_bits": container,
        "seed": run.calibration.seed,
        "versions": record.versions(),
        "machine": record.machine(),
        "calibration": run.calibration.record(),
        "modules": [{"name": key, "loss": loss} for key, loss in run.losses.items()],
        "wall_seconds": run.wall_seconds,
        **record.peak_memory(),
    }
    record.write_json(folder / record.RECORD_FILE, content)
    record.write_card(folder, name, content)
    run.recorder.save(folder)


def describe_method(modifier: Any) -> str:
    """Such as ``MaCa (p = 1)`` or ``GPTQ``."""
    if not isinstance(modifier, MaCaModifier):
        return type(modifier).__name__.removesuffix("Modifier")
    nested = f", nested {modifier.nested_scales}" if modifier.nested_scales else ""
    return f"MaCa (p = {modifier.length_exponent:g}{nested})"


def _public_name(run: Run) -> str:
    if run.source == str(smollm2.cache_folder() / smollm2.NAME):
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return run.source


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output folder {output} is not empty: give another one or --overwrite")
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: give a folder")
    parent = _existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output {output} cannot be made in {parent}: give another one")


def _check_disk(output: Path, shapes: torch.nn.Module) -> None:
    """A quantized checkpoint is smaller than its model: that is what must fit."""
    needed = sum(p.numel() * p.element_size() for p in shapes.parameters())
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{parent} has {free / 1e9:.1f} GB free and the checkpoint may need "
            f"{needed / 1e9:.1f} GB: free some or give another --output"
        )


def _existing_parent(output: Path) -> Path:
    return next(folder for folder in output.parents if folder.exists())


@contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``output`` only when the block ends well."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had the same process id
    partial.mkdir(parents=True)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)  # safetensors writes for its owner only
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename ``partial`` to ``output``; what was there goes only after that."""
    previous = output.with_name(f".{output.name}.{os.getpid()}.previous")
    if output.exists():
        output.rename(previous)
    try:
        partial.rename(output)
    except BaseException:
        if previous.exists():
            previous.rename(output)
        raise
    shutil.rmtree(previous, ignore_errors=True)
