"""A verification: the engine is asked, stopped, and its answers held to the checkpoint's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maca_serve.common.console import progress
from maca_serve.common.errors import BrokenAnswerError, UserError
from maca_serve.common.machine import describe_machine, require_vllm, versions
from maca_serve.common.ranks import Ranks, check_ranks
from maca_serve.doctor import diagnose
from maca_serve.doctor.checks import require_sound
from maca_serve.doctor.headers import read_headers
from maca_serve.doctor.loadable import require_loadable
from maca_serve.doctor.view import in_one_line
from maca_serve.engine.engine import Engine
from maca_serve.engine.enginelog import find_dtype
from maca_serve.engine.fit import fit
from maca_serve.formats.checkpoint import Checkpoint, open_checkpoint, require_same_model
from maca_serve.verification import agreement
from maca_serve.verification.checks import (
    FAIL,
    Check,
    check_kernel,
    check_memory,
    held,
    not_checked,
)
from maca_serve.verification.probing import Answers, probe
from maca_serve.verification.prompts import NEW_TOKENS, Prompt, make_prompts
from maca_serve.verification.reference import NoReference, load_reference


def verify(
    folder: str | Path, *, base: str | Path | None = None, tensor_parallel: int = 1
) -> dict[str, Any]:
    """Start the engine on a checkpoint and prove that it computes what the checkpoint says.

    The engine runs first and is stopped; then transformers computes the same on the CPU, from
    weights dequantized here, in bfloat16 and in float32.

    Args:
        folder: the checkpoint.
        base: the unquantized model's folder; the engine must then be nearer to the checkpoint.
        tensor_parallel: ranks of the engine.

    Returns:
        {"name", "path", "scheme", "ranks", "kernel", "passed": no check failed,
        "prompts": tokens of each, "checks": [{"name", "status": `pass`, `fail` or `not checked`,
        "found", "limit", "numbers"}], "versions", "machine"}.

    Raises:
        UserError: no checkpoint, unreadable or damaged files, what the doctor says vLLM would not
            load, a base that was not quantized to this, or ranks that do not divide the model.
        EngineError: vLLM did not start, or died.
    """
    version = require_vllm()
    checkpoint = open_checkpoint(Path(folder))
    unquantized = _open_base(checkpoint, base)
    ranks = Ranks(tensor=tensor_parallel)
    check_ranks(checkpoint, ranks)
    prompts = make_prompts(checkpoint)
    require_sound(checkpoint.path, checkpoint.config)
    if checkpoint.quantized:
        layers = _diagnose(checkpoint, ranks)
    else:
        require_loadable([checkpoint])
        layers = None
    run = _run_engine(checkpoint, version, prompts, ranks)
    checks = [check_kernel(run.log, layers)]
    checks.append(check_memory(run.log, _loaded_bytes(checkpoint), ranks.count))
    if run.answers is None:
        checks += [Check("finite", FAIL, run.broken), not_checked("agreement", run.broken)]
    else:
        dtype = getattr(torch, find_dtype(run.log) or "bfloat16")
        # bfloat16 is the yardstick of an engine that is nearer to the checkpoint than that, too.
        yardstick = torch.bfloat16 if dtype == torch.float32 else dtype
        checks += _check_answers(checkpoint, unquantized, prompts, run.answers, yardstick)
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "scheme": checkpoint.scheme,
        "ranks": ranks.count,
        "kernel": run.kernel,
        "passed": all(check.status != FAIL for check in checks),
        "prompts": [len(prompt) for prompt in prompts],
        "checks": [check.describe() for check in checks],
        "versions": versions(),
        "machine": describe_machine(),
    }


@dataclass
class _Run:
    """What is left of the engine: its log, its kernels, and its answers or why there are none."""

    log: list[str]
    kernel: str
    answers: Answers | None = None
    broken: str = ""


def _open_base(checkpoint: Checkpoint, base: str | Path | None) -> Checkpoint | None:
    if base is None:
        return None
    opened = open_checkpoint(Path(base))
    require_same_model(opened, checkpoint, "--base")
    return opened


def _diagnose(checkpoint: Checkpoint, ranks: Ranks) -> list[dict[str, Any]]:
    """The doctor's layers; raises UserError for its first error."""
    diagnosis = diagnose(checkpoint.path, tensor_parallel=ranks.tensor)
    for problem in diagnosis["problems"]:
        if problem["severity"] == "error":
            raise UserError(f"{checkpoint.path}: {in_one_line(problem)}")
    layers: list[dict[str, Any]] = diagnosis["layers"]
    return layers


def _loaded_bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.loaded_bytes() for tensor in read_headers(checkpoint.path).values())


def _run_engine(checkpoint: Checkpoint, version: str, prompts: list[Prompt], ranks: Ranks) -> _Run:
    longest = max(map(len, prompts)) + NEW_TOKENS
    settings = fit(checkpoint, version, measured=longest, ranks=ranks)
    with Engine(checkpoint, settings) as engine:
        run = _Run(engine.log.read_text(encoding="utf-8").splitlines(), engine.kernel)
        with progress() as bar:
            total = 2 * sum(map(len, prompts))
            task = bar.add_task(f"asking {checkpoint.name}", total=total, note="vLLM")
            try:
                run.answers = probe(engine.client(), prompts, lambda n: bar.advance(task, n))
            except BrokenAnswerError as error:
                run.broken = str(error)
    return run


def _check_answers(
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    prompts: list[Prompt],
    answers: Answers,
    dtype: torch.dtype,
) -> list[Check]:
    places = sum(len(prompt) - 1 for prompt in prompts)
    # The client refuses any other answer.
    checks = [held("finite", True, f"{2 * places} log-probabilities of the engine", "all")]
    engine = [agreement.of_engine(answer) for answer in answers.together]
    try:
        rounded, exact = _predict(checkpoint, prompts, answers, dtype)
    except NoReference as reason:
        why = f"no reference: {reason}"
        return [*checks, not_checked("agreement", why), not_checked("alone and in a batch", why)]
    if not all(prediction.finite for prediction in rounded + exact):
        why = "the dequantized weights give NaN or infinity in transformers: quantize again"
        return [*checks, Check("finite reference", FAIL, why)]
    noise = agreement.distance(rounded, exact)
    checks += agreement.check_agreement(prompts, engine, rounded, exact)
    checks.append(agreement.check_batches(answers.together, answers.alone, noise))
    if base is not None:
        checks.append(_check_base(base, prompts, answers, engine, exact, noise))
    return checks


def _predict(
    checkpoint: Checkpoint,
    prompts: list[Prompt],
    answers: Answers,
    dtype: torch.dtype,
    computed: tuple[str, ...] = ("bfloat16", "float32"),
) -> list[list[agreement.Prediction]]:
    """What the dequantized checkpoint says, computed in each of these."""
    found = []
    with progress() as bar:
        task = bar.add_task(
            f"reference of {checkpoint.name}",
            total=len(computed) * sum(map(len, prompts)),
            note="loading",
        )
        model = load_reference(checkpoint, dtype)
        for name in computed:
            if name == "float32":
                model.float()
            bar.update(task, note=name)
            found.append(
                agreement.of_all(model, prompts, answers.together, lambda n: bar.advance(task, n))
            )
    return found


def _check_base(
    base: Checkpoint,
    prompts: list[Prompt],
    answers: Answers,
    engine: list[agreement.Prediction],
    exact: list[agreement.Prediction],
    noise: agreement.Distance,
) -> Check:
    try:
        (unquantized,) = _predict(base, prompts, answers, torch.bfloat16, ("float32",))
    except NoReference as reason:
        return not_checked(agreement.NEARER, f"no reference of {base.path}: {reason}")
    return agreement.check_base(engine, exact, unquantized, noise)
