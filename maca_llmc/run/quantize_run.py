"""The quantize run: check everything first, calibrate, save beside, rename."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmcompressor import oneshot
from loguru import logger

from maca_llmc.calibrate import pipeline
from maca_llmc.calibrate.full_precision import forward_passes
from maca_llmc.calibrate.hidden_states import HiddenStates
from maca_llmc.calibrate.smoothing import named_refusals
from maca_llmc.common import record
from maca_llmc.common.errors import UserError
from maca_llmc.common.files import write_json
from maca_llmc.common.memory import available_memory
from maca_llmc.common.progress import layer_progress, quiet, tell, tell_calibration
from maca_llmc.common.resource_errors import named_faults
from maca_llmc.gptq.losses import recorded_losses
from maca_llmc.llmcompressor_api import (
    computing_on,
    decoder_layers,
    forget_causal_masks,
    keep_causal_masks,
)
from maca_llmc.model import base_weights, loading, smollm2
from maca_llmc.modifier import MaCaModifier
from maca_llmc.options import QuantizeOptions
from maca_llmc.planning.plans import targeted
from maca_llmc.recipe.containers import widen_containers
from maca_llmc.recipe.reading import save_recipe
from maca_llmc.recipe.schemes import describe_scheme
from maca_llmc.run.output import check_disk, resolve_output
from maca_llmc.run.prepare import Run, prepare
from maca_llmc.run.resume import LayerKeeper, run_identity
from maca_llmc.run.state import RunState
from maca_llmc.run.written import check_set, check_written, sample_weights


def quantize(output: str | Path, options: QuantizeOptions) -> Path:
    """Quantize a model and write a checkpoint, see :func:`maca_llmc.quantize`; tunes nothing."""
    given, output = Path(output).expanduser().absolute(), resolve_output(output)
    run = prepare(output, options)
    check_disk(output, run.shapes)
    _warn_of_dropped(run.draft_layers)
    identity = run_identity(run)
    resume, overwrite = options.resume, options.overwrite
    if resume and (finished := record.finished_identity(output)) is not None:
        if finished == identity:  # killed after the checkpoint was put in place
            RunState(output, identity, resume=True).close(keep=False)
            return given
        if not overwrite:
            raise UserError(f"output folder {output} is not empty: give another one or --overwrite")
    state = RunState(output, identity, resume=resume, anew=overwrite)
    if resume and not (state.finished or state.is_complete):
        logger.warning(f"nothing to resume in {state.folder}: starting anew")
    done = False
    try:
        with named_faults(state.folder):
            if not state.is_complete:
                _quantize(run, output.name, state, identity)
            state.put_in_place(replace=overwrite and (output / record.RECORD_FILE).is_file())
        done = True
    finally:
        state.close(keep=not done)
        if not done and state.finished:
            logger.warning(
                f"{state.finished} finished layers ({state.bytes / 1e6:.0f} MB) are kept in "
                f"{state.folder}: the same command with --resume goes on after them"
            )
    return given


def _quantize(run: Run, name: str, state: RunState, identity: dict[str, Any]) -> None:
    quantized = _calibrate(run, state)
    check_set(quantized)
    computed = sample_weights(quantized, targeted(run))
    if run.container:
        widen_containers(quantized)
    partial = state.folder / "checkpoint"
    partial.mkdir()
    with run.timed("save"), quiet():
        loading.save_model(quantized, partial)
        run.tokenizer.save_pretrained(partial)
        for file in run.processor_files:
            shutil.copyfile(file, partial / file.name)
        save_recipe(run.recipe, partial)
        check_written(quantized, partial, computed)
        run.dropped = base_weights.dropped(run.source, partial, run.config)
    _warn_of_dropped(run.dropped, known=run.draft_layers)
    _write_records(run, partial, name, state, identity)
    _make_readable(partial)
    state.complete(partial)


def _warn_of_dropped(dropped: dict[str, int], known: Iterable[str] = ()) -> None:
    for name, count in dropped.items():
        if name not in known:
            logger.warning(
                f"the checkpoint has no {name} ({count} tensors of the base model): transformers "
                "loads the model without"
            )


def _calibrate(run: Run, state: RunState) -> Any:
    with run.timed("load"), quiet():
        model = loading.load_model(run.source, run.config)
    if isinstance(run.modifier, MaCaModifier):
        run.modifier.record_diagonals(run.recorder)
    loader = run.calibration.dataloader(run.batch_tokens)
    names = {module: name for name, module in model.named_modules()}
    tell_calibration(run.calibration.record())
    if state.finished:
        tell(f"{state.finished} of {len(decoder_layers(model))} layers are finished already")
    limit = available_memory() // 2 if run.cache_bytes is None else run.cache_bytes
    place = run.hidden_place
    on_host = place.type == "cpu"
    hidden = HiddenStates(limit, state.folder / "spill") if on_host else HiddenStates()
    passes = forward_passes(run.recipe.modifiers)
    keep_causal_masks(model.config)
    try:
        with (
            run.timed("calibrate"),
            computing_on(run.device),
            layer_progress(decoder_layers(model), len(loader), passes, state.finished),
            recorded_losses(lambda module, loss: run.losses.update({names[module]: loss})),
            pipeline.using(pipeline.Resources(LayerKeeper(run, state), hidden)),
            named_refusals(run.recipe.modifiers),
        ):
            oneshot(
                model=model,
                processor=run.tokenizer,
                dataset=loader,
                recipe=run.recipe,
                pipeline=pipeline.NAME,
                sequential_offload_device=str(place),
            )
        run.spilled_bytes = hidden.spilled_bytes
    finally:
        forget_causal_masks(model.config)
    return model


def _write_records(
    run: Run, folder: Path, name: str, state: RunState, identity: dict[str, Any]
) -> None:
    schemes = [
        describe_scheme(scheme)
        for modifier in run.modifiers
        for scheme in modifier.resolved_config.config_groups.values()
    ]
    container = run.container
    content = {
        "format": 1,
        "base_model": _public_name(run),
        "license": record.base_license(run.source),
        "scheme": "; ".join(schemes) + (f", in {container}-bit containers" if container else ""),
        "method": describe_method(run.modifier),
        "modifier": {
            "type": type(run.modifier).__name__,
            **run.modifier.model_dump(
                include={
                    "length_exponent",
                    "nested_scales",
                    "first_token_weight",
                    "hessian_scales",
                    "signed_scales",
                    "gptaq_alpha",
                    "dampening_frac",
                    "block_size",
                }
            ),
        },
        "container_bits": container,
        "dropped": run.dropped,
        "seed": run.calibration.seed,
        "versions": record.versions(),
        "machine": record.machine(run.device),
        "calibration": run.calibration.record(),
        "modules": [{"name": key, "loss": loss} for key, loss in run.losses.items()],
        "raised_dampening": getattr(run.modifier, "raised_dampening", {}),
        "state_bytes": state.bytes,
        "spilled_bytes": run.spilled_bytes,
        "wall_seconds": run.wall_seconds,
        "identity": identity,
        **record.peak_memory(),
    }
    write_json(folder / record.RECORD_FILE, content)
    record.write_card(folder, name, content)
    run.recorder.save(folder)


def describe_method(modifier: Any) -> str:
    """Such as ``MaCa (p = 1)`` or ``GPTQ``."""
    if not isinstance(modifier, MaCaModifier):
        return type(modifier).__name__.removesuffix("Modifier")
    nested = f", nested {modifier.nested_scales}" if modifier.nested_scales else ""
    first = modifier.first_token_weight
    sink = f", first token x {first:g}" if first != 1.0 else ""
    positive = "" if modifier.signed_scales else "positive "
    scales = f", {positive}scales by Hessian" if modifier.hessian_scales else ""
    kind = "GPTAQ, " if modifier.gptaq_alpha else ""
    return f"MaCa ({kind}p = {modifier.length_exponent:g}{nested}{sink}{scales})"


def _public_name(run: Run) -> str:
    if run.source == str(smollm2.cache_folder() / smollm2.NAME):
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return run.source


def _make_readable(folder: Path) -> None:
    """Give files the rights of any new file: safetensors writes for its owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
