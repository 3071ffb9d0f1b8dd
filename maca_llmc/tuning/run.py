"""The tuning run: check everything first, tune, write beside, rename."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from maca_llmc.common import defaults, record
from maca_llmc.common.device import compute_on, product_dtype, resolve_device
from maca_llmc.common.errors import UserError
from maca_llmc.common.files import write_json
from maca_llmc.common.progress import tell, tell_calibration
from maca_llmc.common.resource_errors import named_faults
from maca_llmc.data import CalibrationSet, build_calibration_set
from maca_llmc.evaluation.divergence import check_quantized, check_same_model, load_dequantized
from maca_llmc.llmcompressor_api import decoder_layers
from maca_llmc.model import loading
from maca_llmc.run.output import check_output, resolve_output
from maca_llmc.run.state import RunState
from maca_llmc.tuning.blocks import tune_blocks
from maca_llmc.tuning.checkpoint import read_weights, write_weights
from maca_llmc.tuning.end_to_end import BaseAnswers, Progress, ScaleTuner
from maca_llmc.tuning.integers import IntegerWeight
from maca_llmc.tuning.keeping import LayerKeeper, load_progress, save_progress
from maca_llmc.tuning.layer import LayerResult
from maca_llmc.tuning.options import BlockOptions, EndToEndOptions
from maca_llmc.tuning.windows import hold_out

CARD = """
## Tuned

{stages} on {tokens} tokens of {source} (count x length: {lengths}); the run record says what it
did.
"""


@dataclass
class Tuning:
    """What a tuning run has decided and found so far.

    :param blocks: of the first stage, None to leave it out; so ``end_to_end``
    """

    checkpoint: Path
    base: str
    calibration: CalibrationSet
    weights: dict[str, IntegerWeight]
    device: torch.device
    dtype: torch.dtype
    blocks: BlockOptions | None
    end_to_end: EndToEndOptions | None
    layers: list[LayerResult] = field(default_factory=list)
    history: list[dict[int, float]] = field(default_factory=list)
    wall_seconds: dict[str, float] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What decides the result: a resumed run must have it in common with the killed one."""
        return {
            "command": "tune",
            "checkpoint": _hash_of(self.checkpoint),
            "base": loading.weights_identity(self.base, loading.read_config(self.base)),
            "data": self.calibration.record()["sha256"],
            "seed": self.calibration.seed,
            "blocks": json.dumps(self.blocks and asdict(self.blocks)),
            "end_to_end": json.dumps(self.end_to_end and asdict(self.end_to_end)),
            "dtype": str(self.dtype),
            "versions": record.versions(),
            "machine": record.machine(self.device),
        }

    def content(self) -> dict[str, Any]:
        """What the run record says of it; JSON-able."""
        return {
            "calibration": self.calibration.record(),
            "seed": self.calibration.seed,
            "held_out_windows": len(hold_out(self.calibration.lengths)[1]),
            "blocks": self.blocks and asdict(self.blocks),
            "layers": [asdict(layer) for layer in self.layers],
            "end_to_end": self.end_to_end and asdict(self.end_to_end),
            "held_out_kl": self.history,
            "versions": record.versions(),
            "machine": record.machine(self.device),
            "wall_seconds": self.wall_seconds,
            **record.peak_memory(),
        }


def tune(
    checkpoint: str | Path,
    output: str | Path,
    *,
    base: str = defaults.MODEL,
    blocks: BlockOptions | bool = True,
    end_to_end: EndToEndOptions | bool = True,
    data: Any = None,
    lengths: Sequence[int] | None = None,
    tokens: int = defaults.TOKENS,
    text_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Tune a quantized checkpoint towards its base: format, size and kernels stay as they are.

    First block by block where weights are rounded and by which scale, then all scales end to end
    against the base's answers. Some calibration windows are held out; what does not get better on
    them is left as it was.

    :param checkpoint: folder of a compressed-tensors checkpoint with integer weights
    :param output: folder to make
    :param base: the unquantized model: a folder, a hub name or the embedded model's name
    :param blocks: run the first stage, True as it is by default; so ``end_to_end`` the second
    :param data: see :func:`maca_llmc.build_calibration_set`; so ``lengths`` (there ``scales``),
        ``tokens``, ``text_column``, ``split``, ``config_name`` and ``seed``
    :param device: "auto", "cpu", "cuda" or "cuda:N"
    :param overwrite: replace ``output``, a checkpoint of ours, when the new one is complete
    :param resume: go on where a killed run of the same settings was
    :return: ``output``
    :raises UserError: for anything the user can mend; nothing is left half-written
    """
    output = resolve_output(output)
    checkpoint = Path(checkpoint).expanduser().resolve()
    if not blocks and not end_to_end:
        raise UserError("--no-blocks --no-end-to-end: nothing is left to do, drop one")
    check_output(output, str(checkpoint), overwrite, resume)
    source = loading.resolve_model(base)
    config = loading.load_config(source)
    check_same_model(base, config, checkpoint, check_quantized(checkpoint))
    target = resolve_device(device)
    compute_on(target)
    context = loading.context_length(config)
    run = Tuning(
        checkpoint=checkpoint,
        base=source,
        calibration=build_calibration_set(
            loading.load_tokenizer(source),
            source=data,
            scales=lengths or [n for n in defaults.SCALES if context is None or n <= context],
            tokens=tokens,
            seed=seed,
            max_context=context,
            text_column=text_column,
            split=split,
            config_name=config_name,
        ),
        weights=read_weights(checkpoint),
        device=target,
        dtype=product_dtype(target),
        blocks=(BlockOptions() if blocks is True else blocks) or None,
        end_to_end=(EndToEndOptions() if end_to_end is True else end_to_end) or None,
    )
    if not hold_out(run.calibration.lengths)[1]:
        raise UserError(
            f"--tokens {tokens}: each length has one window, so none can be held out: give more"
        )
    identity = run.identity()
    if resume and record.finished_identity(output) == identity:
        return output
    state = RunState(output, identity, resume=resume, anew=overwrite)
    done = False
    try:
        with named_faults(state.folder):
            if not state.is_complete:
                _write(run, _tune(run, state), state, output.name, identity)
            state.put_in_place(replace=overwrite)
        done = True
    finally:
        state.close(keep=not done)
    return output


def _tune(run: Tuning, state: RunState) -> dict[str, IntegerWeight]:
    tell_calibration(run.calibration.record())
    windows, seed = run.calibration.sequences, run.calibration.seed
    answers = None
    start = time.perf_counter()
    base = load_dequantized(run.base, run.device)
    student = load_dequantized(str(run.checkpoint), run.device)
    weights, count = run.weights, 0
    if run.end_to_end:
        answers = BaseAnswers(base, windows, run.end_to_end)
    if run.blocks:
        count = len(decoder_layers(student))
        keeper = LayerKeeper(state, weights)
        weights, run.layers = tune_blocks(
            base, student, weights, windows, run.blocks, seed, run.dtype, keeper
        )
        tell(_told_layers(run.layers))
        run.wall_seconds["blocks"] = round(time.perf_counter() - start, 3)
    del base
    if run.end_to_end and answers is not None:
        start = time.perf_counter()
        progress = load_progress(state, count) or Progress()
        tuner = ScaleTuner(student, weights, windows, answers, run.end_to_end, run.dtype)
        best = tuner.train(seed, progress, lambda now: save_progress(state, count, now))
        weights = {name: weight.with_scale(best[name]) for name, weight in weights.items()}
        run.history = progress.history
        run.wall_seconds["end_to_end"] = round(time.perf_counter() - start, 3)
        tell(_told_divergence(run.history))
    return weights


def _write(
    run: Tuning,
    weights: dict[str, IntegerWeight],
    state: RunState,
    name: str,
    identity: dict[str, Any],
) -> None:
    partial = state.folder / "checkpoint"
    partial.mkdir()
    write_weights(run.checkpoint, partial, weights)
    path = partial / record.RECORD_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, before | {"tuning": run.content(), "identity": identity})
    calibration = run.calibration.record()
    stages = [("codes block by block", run.blocks), ("scales end to end", run.end_to_end)]
    with (partial / "README.md").open("a", encoding="utf-8") as card:
        card.write(
            CARD.format(
                stages=" and then ".join(words for words, wanted in stages if wanted).capitalize(),
                tokens=calibration["tokens"],
                source=calibration["source"],
                lengths=record.describe_lengths(calibration),
            )
        )
    state.complete(partial)


def _told_layers(layers: list[LayerResult]) -> str:
    better = [layer for layer in layers if layer.after < layer.before]
    ratio = sum(layer.after / layer.before for layer in layers) / len(layers)
    return (
        f"blocks: {len(better)} of {len(layers)} layers are nearer to the base on held-out windows "
        f"(their error {ratio:.2f} of what it was, in the mean over layers); the others stay"
    )


def _told_divergence(history: list[dict[int, float]]) -> str:
    start = history[0]
    best = min(history, key=lambda looked: sum(looked.values()))
    if best is start:
        return "end to end: nothing was better than the start on held-out windows: scales stay"
    lengths = ", ".join(f"{n}: {start[n]:.4f} to {best[n]:.4f}" for n in start)
    return f"end to end: held-out KL by length, {lengths}"


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
