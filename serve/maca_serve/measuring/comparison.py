"""Compare quantized checkpoints with their base: accuracy, speed and size, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maca_serve.common.errors import IncompleteError
from maca_serve.common.machine import require_vllm
from maca_serve.common.ranks import Ranks
from maca_serve.common.results import check_output, lock_folder, write_measured, write_text
from maca_serve.evaluation.plan import plan_accuracy
from maca_serve.evaluation.recovery import describe_intervals, recovery
from maca_serve.evaluation.tasks import CONTINUATION
from maca_serve.formats.checkpoint import (
    Checkpoint,
    open_all,
    require_quantized,
    require_same_model,
)
from maca_serve.measuring.measure import measure
from maca_serve.measuring.settings import AccuracySettings, SpeedSettings
from maca_serve.reporting.report import render_report
from maca_serve.reporting.summary import judge, rules

OUTPUT = Path("runs/compare")
RESULTS = "results.json"
REPORT = "report.html"


def compare(
    base: str | Path,
    paths: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    lengths: Sequence[int | str] = AccuracySettings.lengths,
    windows: int = AccuracySettings.windows,
    tasks: Sequence[str] = (CONTINUATION,),
    limit: int = AccuracySettings.limit,
    concurrency: Sequence[int] = SpeedSettings.concurrency,
    input_len: Sequence[int] = SpeedSettings.input_len,
    output_len: int = SpeedSettings.output_len,
    prompts: int | None = None,
    rates: Sequence[float] | str = (),
    repeats: int = SpeedSettings.repeats,
    tensor_parallel: int = 1,
    names: Sequence[str] | None = None,
    output: str | Path = OUTPUT,
) -> dict[str, Any]:
    """Measure a base and its quantized checkpoints, and write results.json and report.html.

    Args:
        base: the unquantized model's folder; 100 percent of recovery.
        paths: quantized checkpoint folders.
        text: see `accuracy`, as are lengths, windows, tasks and limit.
        lengths: increasing input lengths in tokens; `context` is the model's.
        windows: target blocks of 32 tokens.
        tasks: JSONL files, `continuation`, `needle`, `copy`, lm-eval task names, `usual`.
        limit: at most this many questions of each task.
        concurrency: see `throughput`, as are all down to repeats.
        input_len: random prompt tokens of a request, every concurrency for each.
        output_len: output tokens of a request.
        prompts: requests of a run.
        rates: requests per second, one run for each.
        repeats: runs of every checkpoint under every load.
        tensor_parallel: ranks of each engine that share every layer.
        names: what results call the checkpoints, the base first; folder names when None.
        output: folder for results.json and report.html, which are replaced if there.

    Returns:
        What results.json holds.

    Raises:
        UserError: bad input, before anything runs; EngineError and RequestError are of this type.
        IncompleteError: some could not be measured; the others are written, see `measure`.
    """
    require_vllm()
    accuracy = AccuracySettings(text, lengths, windows, tasks, limit)
    speed = SpeedSettings(concurrency, input_len, output_len, prompts, rates, repeats)
    folders = [Path(base), *map(Path, paths)]
    checkpoints = open_all(folders, names)
    for checkpoint in checkpoints[1:]:
        require_quantized(checkpoint)
        require_same_model(checkpoints[0], checkpoint, "BASE")
    check_output(output, folder=True)
    with lock_folder(Path(output)):
        return _compare(checkpoints, accuracy, speed, Ranks(tensor_parallel), output)


def _compare(
    checkpoints: list[Checkpoint],
    accuracy: AccuracySettings,
    speed: SpeedSettings,
    ranks: Ranks,
    output: str | Path,
) -> dict[str, Any]:
    plan = plan_accuracy(accuracy, checkpoints)
    try:
        results = measure(checkpoints, plan, speed, ranks=ranks)
    except IncompleteError as error:
        _write(error.results, checkpoints, Path(output))
        raise error.kept_in(Path(output) / RESULTS) from error
    _write(results, checkpoints, Path(output))
    return results


def _write(results: dict[str, Any], checkpoints: list[Checkpoint], output: Path) -> None:
    """Results and report of the checkpoints that were measured; no report where there are none."""
    entries = results["checkpoints"]
    for entry in entries:
        entry["recovery"] = recovery(entries[0], entry)
    for entry in entries[1:]:
        entry["verdict"] = judge(entries[0], entry)
    results["settings"] |= {"intervals": describe_intervals(), "rules": rules()}
    write_measured(output / RESULTS, results)
    # Should what follows fail, no report of an earlier run stands beside these results.
    (output / REPORT).unlink(missing_ok=True)
    if entries:
        names = [entry["name"] for entry in entries]
        kept = [checkpoint for checkpoint in checkpoints if checkpoint.name in names]
        write_text(output / REPORT, render_report(results, kept))
