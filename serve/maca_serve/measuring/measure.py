"""Measure checkpoints through running engines: accuracy one after another, speed in turn."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from maca_serve.common.console import progress
from maca_serve.common.errors import EngineError, IncompleteError, UserError
from maca_serve.common.machine import describe_machine, require_vllm, versions
from maca_serve.common.ranks import Ranks, check_ranks
from maca_serve.common.results import check_output, write_measured
from maca_serve.doctor.checks import require_sound
from maca_serve.doctor.loadable import require_loadable
from maca_serve.engine.engine import Engine
from maca_serve.engine.fit import Fit, fit
from maca_serve.evaluation.plan import AccuracyPlan, plan_accuracy
from maca_serve.evaluation.tasks import CONTINUATION
from maca_serve.formats.checkpoint import Checkpoint, open_all
from maca_serve.measuring.settings import AccuracySettings, SpeedSettings
from maca_serve.speed.alternation import schedule
from maca_serve.speed.bandwidth import copy_bandwidth
from maca_serve.speed.bench import Benchmark
from maca_serve.speed.breakeven import break_even
from maca_serve.speed.memory import bandwidth_share, memory
from maca_serve.speed.rounds import Timing


def accuracy(
    paths: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    lengths: Sequence[int | str] = AccuracySettings.lengths,
    windows: int = AccuracySettings.windows,
    tasks: Sequence[str] = (CONTINUATION,),
    limit: int = AccuracySettings.limit,
    tensor_parallel: int = 1,
    names: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Perplexity of the same target tokens by input length, and multiple choice, through vLLM.

    Args:
        paths: checkpoint folders, quantized or not.
        text: .txt or .jsonl (`text`); the package's English sample when None.
        lengths: increasing input lengths in tokens; `context` is the model's.
        windows: target blocks of 32 tokens, the same under every length.
        tasks: JSONL files (`question`, `choices`, `answer`), `continuation`, `needle`, `copy`,
            lm-eval task names, `usual` for eight of them.
        limit: at most this many questions of each task.
        tensor_parallel: ranks of each engine that share every layer.
        names: what results call the checkpoints; their folders' names when None.
        output: a JSON file to write.

    Returns:
        Results as in results.json, without throughput and recovery.

    Raises:
        UserError: bad input, before anything runs; EngineError and RequestError are of this type.
        IncompleteError: some could not be measured; the others are written, see `measure`.
    """
    require_vllm()
    settings = AccuracySettings(text, lengths, windows, tasks, limit)
    checkpoints = open_all(list(map(Path, paths)), names)
    check_output(output)
    plan = plan_accuracy(settings, checkpoints)
    with _kept(output):
        return _finish(measure(checkpoints, plan, None, ranks=Ranks(tensor_parallel)), output)


def throughput(
    paths: Sequence[str | Path],
    *,
    concurrency: Sequence[int] = SpeedSettings.concurrency,
    input_len: Sequence[int] = SpeedSettings.input_len,
    output_len: int = SpeedSettings.output_len,
    prompts: int | None = None,
    rates: Sequence[float] | str = (),
    repeats: int = SpeedSettings.repeats,
    tensor_parallel: int = 1,
    names: Sequence[str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Latency and throughput by vLLM's own benchmark: TTFT, TPOT, end to end, tokens per second.

    Args:
        paths: checkpoint folders, quantized or not; the others are compared with the first.
        concurrency: requests in flight, one run for each.
        input_len: random prompt tokens of a request, every concurrency for each.
        output_len: output tokens of a request.
        prompts: requests of a run; two for each in flight when None.
        rates: requests per second, one run for each; "auto" for shares of what the first
            checkpoint reached with requests in flight.
        repeats: runs of every checkpoint under every load, in alternating order.
        tensor_parallel: ranks of each engine that share every layer.
        names: what results call the checkpoints; their folders' names when None.
        output: a JSON file to write.

    Returns:
        Results as in results.json, without accuracy and recovery.

    Raises:
        UserError: bad input, before anything runs; EngineError and RequestError are of this type.
        IncompleteError: some could not be measured; the others are written, see `measure`.
    """
    require_vllm()
    settings = SpeedSettings(concurrency, input_len, output_len, prompts, rates, repeats)
    checkpoints = open_all(list(map(Path, paths)), names)
    check_output(output)
    with _kept(output):
        return _finish(measure(checkpoints, None, settings, ranks=Ranks(tensor_parallel)), output)


def measure(
    checkpoints: list[Checkpoint],
    plan: AccuracyPlan | None,
    speed: SpeedSettings | None,
    fits: list[Fit] | None = None,
    ranks: Ranks = Ranks(),
) -> dict[str, Any]:
    """Measure accuracy, speed or both.

    Args:
        checkpoints: in this order; the others' speed is compared with the first's.
        plan: for accuracy, or None.
        speed: for throughput, or None.
        fits: settings of the engines; fit for the machine when None.
        ranks: of each engine, for settings that are fit here.

    Returns:
        {"created": when it began, "machine", "versions", "settings", "schedule", "checkpoints"}.

    Raises:
        UserError: requests that do not fit a model's context, ranks that do not divide a model, or
            a failing engine before anything was measured.
        IncompleteError: a later failing engine. Its results have as "checkpoints" those that were
            measured in full, and "failed": [{"name", "path", "error", "measured": what was}].
    """
    version = require_vllm()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    for checkpoint in checkpoints:
        require_sound(checkpoint.path, checkpoint.config)
        _require_fits(checkpoint, speed)
    require_loadable(checkpoints)
    for checkpoint in checkpoints:
        check_ranks(checkpoint, ranks)
    longest = max(plan.longest if plan else 0, speed.longest if speed else 0)
    fits = fits or [fit(each, version, measured=longest, ranks=ranks) for each in checkpoints]
    repeats = speed.repeats if speed else 0
    visits = schedule(checkpoints, fits, version, repeats)
    machine = describe_machine()
    if speed:
        machine["copy_bandwidth"] = copy_bandwidth(version, ranks.count)
    entries: list[dict[str, Any]] = [{} for _ in checkpoints]
    failed: dict[int, UserError] = {}
    with contextlib.ExitStack() as stack:
        benchmark = stack.enter_context(Benchmark(speed)) if speed else None
        timing = Timing(benchmark, checkpoints[0].name) if benchmark else None
        for visit in visits.visits:
            engines = {
                place: Engine(checkpoints[place], fits[place])
                for place in visit.checkpoints
                if place not in failed
            }
            _visit(engines, visit.rounds, entries, plan, timing, failed)
            if timing and 0 in failed:
                break  # nothing is left to compare with
    if timing and 0 in failed:
        lost = UserError(f"not compared, for {checkpoints[0].path} failed")
        failed |= {place: lost for place in range(len(checkpoints)) if place not in failed}
    complete = [place for place in range(len(checkpoints)) if place not in failed]
    measured = [entries[place] for place in complete]
    if timing and complete:
        kept = [checkpoints[place] for place in complete]
        _add_speed(measured, kept, timing, machine["copy_bandwidth"]["bytes_per_s"])
    results: dict[str, Any] = {
        "created": created,
        "machine": machine,
        "versions": versions(),
        "settings": {
            "accuracy": plan.describe() if plan else None,
            "speed": speed.describe() if speed else None,
            "engine": {
                checkpoint.name: {"arguments": s.arguments, "environment": s.environment}
                for checkpoint, s in zip(checkpoints, fits, strict=True)
            },
        },
        "schedule": visits.describe([checkpoint.name for checkpoint in checkpoints], repeats),
        "checkpoints": measured,
    }
    if failed:
        results["failed"] = [
            {
                "name": checkpoints[place].name,
                "path": str(checkpoints[place].path),
                "error": str(error),
                "measured": _parts(entries[place], checkpoints[place].name, timing),
            }
            for place, error in failed.items()
        ]
        raise _failure(results, list(failed.values()))
    return results


def _visit(
    engines: dict[int, Engine],
    rounds: Sequence[int],
    entries: list[dict[str, Any]],
    plan: AccuracyPlan | None,
    timing: Timing | None,
    failed: dict[int, UserError],
) -> None:
    """Start engines, score those that are new and time them; what fails goes into `failed`.

    One that does not start, or cannot be scored, leaves the others be. Who failed while several
    were timed is not told apart: none of them has all its runs.
    """
    running: dict[int, Engine] = {}
    try:
        with contextlib.ExitStack() as up:
            for place, engine in engines.items():
                try:
                    with contextlib.ExitStack() as own:
                        _opened(entries[place], own.enter_context(engine), plan)
                        running[place] = engine
                        up.enter_context(own.pop_all())
                except UserError as error:
                    failed[place] = error
                    if place == 0 and timing:
                        return
            if timing and running:
                timing.run(list(running.values()), rounds)
    except UserError as error:
        failed |= dict.fromkeys(running, error)


def _parts(entry: dict[str, Any], name: str, timing: Timing | None) -> dict[str, Any]:
    """What was measured of a checkpoint that failed."""
    parts = entry if "perplexity" in entry else {}
    return {**parts, **timing.results(name)} if timing and name in timing else parts


def _failure(results: dict[str, Any], errors: list[UserError]) -> UserError:
    """What to raise: the first error itself where nothing was measured."""
    if not results["checkpoints"] and not any(each["measured"] for each in results["failed"]):
        return errors[0]
    said = list(dict.fromkeys(map(str, errors)))
    details = errors[0].details if isinstance(errors[0], EngineError) else []
    return IncompleteError("; ".join(said), details, results)


def _opened(entry: dict[str, Any], engine: Engine, plan: AccuracyPlan | None) -> None:
    """At the first start of a checkpoint's engine all but speed; at a second the time it took."""
    if entry:
        entry["seconds"]["start"] = round(entry["seconds"]["start"] + engine.start_seconds, 1)
        return
    checkpoint = engine.checkpoint
    entry |= {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "scheme": checkpoint.scheme,
        "kernel": engine.kernel,
        "dtype": engine.dtype,
        "size_bytes": checkpoint.size_bytes,
        "memory": memory(checkpoint, engine.log_lines, engine.fit.ranks),
        "seconds": {"start": round(engine.start_seconds, 1)},
    }
    if plan is not None:
        began = time.monotonic()
        entry |= _score(engine, plan)
        entry["seconds"]["accuracy"] = round(time.monotonic() - began, 1)


def _add_speed(
    entries: list[dict[str, Any]], checkpoints: list[Checkpoint], timing: Timing, copied: float
) -> None:
    for entry, checkpoint in zip(entries, checkpoints, strict=True):
        entry |= timing.results(entry["name"])
        entry["seconds"]["throughput"] = round(timing.seconds(entry["name"]), 1)
        dtype = entry["dtype"] or "bfloat16"
        entry["bandwidth"] = bandwidth_share(checkpoint, entry["throughput"], copied, dtype)
        if entry is not entries[0]:
            entry["break_even"] = break_even(entries[0], entry)


def _score(engine: Engine, plan: AccuracyPlan) -> dict[str, Any]:
    with progress() as bar:
        task = bar.add_task(f"scoring {engine.checkpoint.name}", total=plan.tokens, note="")

        def advance(tokens: int) -> None:
            bar.update(task, advance=tokens)

        return plan.score(engine.checkpoint, engine.client(), engine.url, advance)


def _require_fits(checkpoint: Checkpoint, speed: SpeedSettings | None) -> None:
    if speed is None or checkpoint.context is None:
        return
    if speed.longest > checkpoint.context:
        raise UserError(
            f"--input-len {max(speed.input_len)} and --output-len {speed.output_len} are together"
            f" longer than the context of {checkpoint.path}, {checkpoint.context}"
        )


@contextlib.contextmanager
def _kept(output: str | Path | None) -> Iterator[None]:
    """Write what was measured, where not all could be."""
    try:
        yield
    except IncompleteError as error:
        if output is None:
            raise
        _finish(error.results, output)
        raise error.kept_in(Path(output)) from error


def _finish(results: dict[str, Any], output: str | Path | None) -> dict[str, Any]:
    if output is not None:
        write_measured(Path(output), results)
    return results
