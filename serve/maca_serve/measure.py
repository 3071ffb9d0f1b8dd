"""Measure checkpoints one after another, one engine start for each."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maca_serve.accuracy_plan import AccuracyPlan, plan_accuracy
from maca_serve.bench import Benchmark
from maca_serve.checkpoint import Checkpoint, open_all
from maca_serve.console import progress
from maca_serve.doctor.checks import require_sound
from maca_serve.engine import Engine
from maca_serve.errors import UserError
from maca_serve.fit import fit
from maca_serve.machine import describe_machine, require_vllm, versions
from maca_serve.results import check_output, write_json
from maca_serve.settings import (
    CONCURRENCY,
    INPUT_LEN,
    LENGTHS,
    LIMIT,
    OUTPUT_LEN,
    WINDOWS,
    AccuracySettings,
    SpeedSettings,
)
from maca_serve.tasks import CONTINUATION


def accuracy(
    paths: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    lengths: Sequence[int] = LENGTHS,
    windows: int = WINDOWS,
    tasks: Sequence[str] = (CONTINUATION,),
    limit: int = LIMIT,
    names: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Perplexity of the same target tokens by input length, and multiple choice, through vLLM.

    Args:
        paths: checkpoint folders, quantized or not.
        text: .txt or .jsonl (`text`); the package's English sample when None.
        lengths: increasing input lengths in tokens.
        windows: target blocks of 32 tokens, the same under every length.
        tasks: JSONL files (`question`, `choices`, `answer`), `continuation`, lm-eval task names.
        limit: at most this many questions of each task.
        names: what results call the checkpoints; their folders' names when None.
        output: a JSON file to write.

    Returns:
        Results as in results.json, without throughput and recovery.

    Raises:
        UserError: bad input, before anything runs; EngineError and RequestError are of this type.
    """
    require_vllm()
    settings = AccuracySettings(
        Path(text) if text else None, tuple(lengths), windows, tuple(tasks), limit
    )
    checkpoints = open_all([Path(path) for path in paths], _as_list(names))
    check_output(output)
    plan = plan_accuracy(settings, checkpoints)
    return _finish(measure(checkpoints, plan, None), output)


def throughput(
    paths: Sequence[str | Path],
    *,
    concurrency: Sequence[int] = CONCURRENCY,
    input_len: int = INPUT_LEN,
    output_len: int = OUTPUT_LEN,
    prompts: int | None = None,
    names: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Latency and throughput by vLLM's own benchmark: TTFT, TPOT, end to end, tokens per second.

    Args:
        paths: checkpoint folders, quantized or not.
        concurrency: requests in flight, one run for each.
        input_len: random prompt tokens of a request.
        output_len: output tokens of a request.
        prompts: requests of a run; two for each in flight, at least 4, when None.
        names: what results call the checkpoints; their folders' names when None.
        output: a JSON file to write.

    Returns:
        Results as in results.json, without accuracy and recovery.

    Raises:
        UserError: bad input, before anything runs; EngineError and RequestError are of this type.
    """
    require_vllm()
    settings = SpeedSettings(tuple(concurrency), input_len, output_len, prompts)
    checkpoints = open_all([Path(path) for path in paths], _as_list(names))
    check_output(output)
    return _finish(measure(checkpoints, None, settings), output)


def measure(
    checkpoints: list[Checkpoint], plan: AccuracyPlan | None, speed: SpeedSettings | None
) -> dict[str, Any]:
    """Measure accuracy, speed or both.

    Args:
        checkpoints: in this order, each on an engine of its own.
        plan: for accuracy, or None.
        speed: for throughput, or None.

    Returns:
        {"machine", "versions", "settings", "checkpoints"}.

    Raises:
        UserError: requests that do not fit a model's context, or a failing engine.
    """
    version = require_vllm()
    longest = _longest_request(plan, speed)
    for checkpoint in checkpoints:
        require_sound(checkpoint.path, checkpoint.config)
        _require_fits(checkpoint, speed)
    fits = [fit(checkpoint, version, measured=longest) for checkpoint in checkpoints]
    with contextlib.ExitStack() as stack:
        benchmark = stack.enter_context(Benchmark(speed)) if speed else None
        entries = []
        for checkpoint, settings in zip(checkpoints, fits, strict=True):
            with Engine(checkpoint, settings) as engine:
                entries.append(_measure_one(engine, plan, benchmark))
    return {
        "machine": describe_machine(),
        "versions": versions(),
        "settings": {
            "accuracy": plan.describe() if plan else None,
            "speed": speed.describe() if speed else None,
            "engine": {
                checkpoint.name: {"arguments": s.arguments, "environment": s.environment}
                for checkpoint, s in zip(checkpoints, fits, strict=True)
            },
        },
        "checkpoints": entries,
    }


def _measure_one(
    engine: Engine, plan: AccuracyPlan | None, benchmark: Benchmark | None
) -> dict[str, Any]:
    checkpoint = engine.checkpoint
    entry: dict[str, Any] = {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "scheme": checkpoint.scheme,
        "kernel": engine.kernel,
        "size_bytes": checkpoint.size_bytes,
        "seconds": {"start": round(engine.start_seconds, 1)},
    }
    began = time.monotonic()
    if plan is not None:
        entry |= _score(engine, plan)
        entry["seconds"]["accuracy"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    if benchmark is not None:
        entry["throughput"] = _bench(engine, benchmark)
        entry["seconds"]["throughput"] = round(time.monotonic() - began, 1)
    return entry


def _score(engine: Engine, plan: AccuracyPlan) -> dict[str, Any]:
    with progress() as bar:
        task = bar.add_task(f"scoring {engine.checkpoint.name}", total=plan.tokens, note="")

        def advance(tokens: int) -> None:
            bar.update(task, advance=tokens)

        return plan.score(engine.checkpoint, engine.client(), engine.url, advance)


def _bench(engine: Engine, benchmark: Benchmark) -> dict[str, Any]:
    levels = benchmark.settings.concurrency
    with progress() as bar:
        task = bar.add_task(f"timing {engine.checkpoint.name}", total=len(levels), note="")
        results = {}
        for concurrency in levels:
            bar.update(task, note=f"{concurrency} in flight")
            results[str(concurrency)] = benchmark.run(engine, concurrency)
            bar.update(task, advance=1)
    return results


def _longest_request(plan: AccuracyPlan | None, speed: SpeedSettings | None) -> int:
    return max(
        plan.longest if plan else 0,
        speed.input_len + speed.output_len if speed else 0,
    )


def _require_fits(checkpoint: Checkpoint, speed: SpeedSettings | None) -> None:
    if speed is None or checkpoint.context is None:
        return
    if speed.input_len + speed.output_len > checkpoint.context:
        raise UserError(
            f"--input-len {speed.input_len} and --output-len {speed.output_len} are together"
            f" longer than the context of {checkpoint.path}, {checkpoint.context}"
        )


def _as_list(names: Sequence[str] | None) -> list[str] | None:
    return list(names) if names is not None else None


def _finish(results: dict[str, Any], output: str | Path | None) -> dict[str, Any]:
    if output is not None:
        write_json(Path(output), results)
    return results
