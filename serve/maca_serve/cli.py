"""The command `maca-serve`."""

import errno
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from maca_llmc.common.command import version_option
from maca_serve.common.console import err, out
from maca_serve.common.errors import EngineError, IncompleteError, UserError
from maca_serve.common.options import (
    Concurrency,
    Folder,
    Folders,
    InputLen,
    Lengths,
    Limit,
    Names,
    Output,
    OutputLen,
    Prompts,
    Rates,
    Repeats,
    Tasks,
    TensorParallel,
    Text,
    Windows,
    join,
    lengths_of,
    numbers_of,
    rates_of,
    split,
    split_tasks,
)
from maca_serve.engine.process import SAFE_PATH
from maca_serve.evaluation.tasks import CONTINUATION
from maca_serve.measuring.settings import AccuracySettings, SpeedSettings

app = typer.Typer(
    name="maca-serve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


UsageError: Any = typer.BadParameter.__base__  # of typer's own copy of click
HERE = "here"


def _versions() -> dict[str, str | None]:
    from maca_serve.common.machine import versions

    return versions()


@app.callback()
def command(version: Annotated[bool, version_option(_versions)] = False) -> None:
    """Serve compressed-tensors checkpoints with vLLM, and measure what came out."""


@app.command()
def up(
    folder: Folder,
    vllm_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="Further flags for `vllm serve`."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="TCP port; 8000, or a free one where that is taken.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output; fit for the machine if unset.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients must show; better in VLLM_API_KEY, which `ps` hides."),
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline-parallel ranks.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="CPU cores to compute on; fit for the machine if unset.")
    ] = None,
) -> None:
    """Serve a checkpoint until Ctrl-C, and say which kernel vLLM chose."""
    from maca_serve.engine import launch

    engine = launch.up(
        folder,
        port=launch.usual_port(host) if port is None else port,
        max_model_len=max_model_len,
        host=host,
        api_key=api_key,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        threads=threads,
        vllm_flags=vllm_flags or (),
    )
    engine.any_port = port is None
    if port is None and engine.port != launch.PORT:
        _warn(f"port {launch.PORT} is taken: using {engine.port}")
    if not (engine.local or engine.api_key):
        _warn(f"whoever reaches {host} may use it: set VLLM_API_KEY, or a --host of this machine")
    with engine:
        for line in launch.describe(engine):
            _say(line)
        engine.wait()


@app.command()
def accuracy(
    folders: Folders,
    text: Text = None,
    lengths: Lengths = join(AccuracySettings.lengths),
    windows: Windows = AccuracySettings.windows,
    tasks: Tasks = [CONTINUATION],  # noqa: B006
    limit: Limit = AccuracySettings.limit,
    tp: TensorParallel = 1,
    names: Names = None,
    output: Output = None,
) -> None:
    """Perplexity by input length and multiple choice, through the running vLLM."""
    from maca_serve.measuring import measure

    results = measure.accuracy(
        folders,
        text=text,
        lengths=lengths_of(lengths),
        windows=windows,
        tasks=split_tasks(tasks),
        limit=limit,
        tensor_parallel=tp,
        names=split(names),
        output=output,
    )
    _show(results, output)


@app.command()
def throughput(
    folders: Folders,
    concurrency: Concurrency = join(SpeedSettings.concurrency),
    input_len: InputLen = join(SpeedSettings.input_len),
    output_len: OutputLen = SpeedSettings.output_len,
    prompts: Prompts = None,
    rates: Rates = None,
    repeats: Repeats = SpeedSettings.repeats,
    tp: TensorParallel = 1,
    names: Names = None,
    output: Output = None,
) -> None:
    """Latency and throughput by `vllm bench serve`: TTFT, TPOT, end to end, tokens per second."""
    from maca_serve.measuring import measure

    results = measure.throughput(
        folders,
        concurrency=numbers_of("--concurrency", concurrency),
        input_len=numbers_of("--input-len", input_len),
        output_len=output_len,
        prompts=prompts,
        rates=rates_of(rates),
        repeats=repeats,
        tensor_parallel=tp,
        names=split(names),
        output=output,
    )
    _show(results, output)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The unquantized model's folder.")],
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Quantized checkpoint folders.")
    ],
    text: Text = None,
    lengths: Lengths = join(AccuracySettings.lengths),
    windows: Windows = AccuracySettings.windows,
    tasks: Tasks = [CONTINUATION],  # noqa: B006
    limit: Limit = AccuracySettings.limit,
    concurrency: Concurrency = join(SpeedSettings.concurrency),
    input_len: InputLen = join(SpeedSettings.input_len),
    output_len: OutputLen = SpeedSettings.output_len,
    prompts: Prompts = None,
    rates: Rates = None,
    repeats: Repeats = SpeedSettings.repeats,
    tp: TensorParallel = 1,
    names: Names = None,
    output: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path(
        "runs/compare"
    ),
) -> None:
    """Accuracy and throughput of quantized checkpoints beside their base, with a report."""
    from maca_serve.formats.checkpoint import tell_apart

    tell_apart([base, *folders], split(names))  # before what takes seconds to import
    from maca_serve.measuring import comparison

    results = comparison.compare(
        base,
        folders,
        text=text,
        lengths=lengths_of(lengths),
        windows=windows,
        tasks=split_tasks(tasks),
        limit=limit,
        concurrency=numbers_of("--concurrency", concurrency),
        input_len=numbers_of("--input-len", input_len),
        output_len=output_len,
        prompts=prompts,
        rates=rates_of(rates),
        repeats=repeats,
        tensor_parallel=tp,
        names=split(names),
        output=output,
    )
    _show(results, output / comparison.RESULTS)
    _say(f"report:  {output / comparison.REPORT}")


@app.command()
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Checkpoint folder.", show_default=False)
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(help="Cards or compute capabilities: h100 or 80,90,here; here: this machine."),
    ] = HERE,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    shapes: Annotated[
        Path | None,
        typer.Option(help='JSON {"config", "layers": {"name": [out, in]}} in place of DIR.'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Check a checkpoint without loading it: tensors, kernels, fallbacks; 1: would not load."""
    from maca_serve import doctor
    from maca_serve.doctor import view

    if folder is not None and shapes is None:
        subject = doctor.read_folder(folder)
    elif shapes is not None and folder is None:
        subject = doctor.read_shapes(shapes)
    else:
        raise UserError("give a checkpoint folder DIR or a file --shapes, one of them")
    gpus = [None if name == HERE else name for name in split(gpu) or []]
    found = doctor.diagnose_cards(subject, gpus, tensor_parallel=tp)
    if as_json:
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        for place, diagnosis in enumerate(found):
            if place:
                _say("")
            for line in view.lines(diagnosis):
                _say(line)
            out.print(view.layer_table(diagnosis))
            for line in view.endings(diagnosis):
                _say(line)
    if any(diagnosis["verdict"] == "does not load" for diagnosis in found):
        raise typer.Exit(1)


@app.command()
def repack(
    folder: Folder,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    container: Annotated[int, typer.Option(help="Bits of a container: 4.")] = 4,
) -> None:
    """Put 2- or 3-bit weights into 4-bit containers, same values, for kernels that want 4 bits."""
    from maca_serve.formats.repacking import repack

    made = repack(folder, output, container=container)
    _say(
        f"wrote {made['output']} ({made['size_bytes'] / 1e6:.1f} MB):"
        f" {made['modules']} modules in {container}-bit containers"
    )


@app.command()
def verify(
    folder: Folder,
    base: Annotated[
        Path | None, typer.Option(help="The unquantized model's folder, to be told apart from.")
    ] = None,
    tp: TensorParallel = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """Serve a checkpoint and prove the answers against transformers; 1: a check failed."""
    from maca_serve.verification import verify, view

    result = verify(folder, base=base, tensor_parallel=tp)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _say(f"{result['name']}: {result['scheme']}")
        out.print(view.check_table(result))
        _say(view.verdict(result))
    if not result["passed"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line: 0 on success, 2 on a user's error, 130 on Ctrl-C."""
    os.environ.update(SAFE_PATH)  # whatever a library here starts
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    # a shell starts what it puts in the background with this one ignored, and so would we
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="maca-serve", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "maca-serve"
        line = f"error: {error.format_message()} (see {command} --help)"
        err.print(line, markup=False, soft_wrap=True)
        code = 2
    except typer.Abort:
        code = 130
    except UserError as error:
        if isinstance(error, IncompleteError):
            _show(error.results, None)
        for line in error.details if isinstance(error, EngineError) else []:
            err.print(line, style="dim", markup=False, soft_wrap=True)
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        code = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or f"{tempfile.gettempdir()} or the output's"
        err.print(f"error: the disk of {place} is full", markup=False, soft_wrap=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _leave(number: int, frame: object) -> None:
    """Unwind as on Ctrl-C, so that no engine is left behind."""
    sys.exit(128 + number)


def _show(results: dict[str, Any], path: Path | None) -> None:
    from maca_serve.reporting.tables import result_tables

    for table in result_tables(results, out.width) if results["checkpoints"] else ():
        out.print(table)
        out.print()
    for entry in results["checkpoints"]:
        if "verdict" in entry:
            _say(f"{entry['verdict']['verdict']}: {entry['verdict']['sentence']}")
    if path is not None:
        _say(f"results: {path}")


def _say(line: str) -> None:
    out.print(line, markup=False, soft_wrap=True)


def _warn(line: str) -> None:
    err.print(f"warning: {line}", markup=False, soft_wrap=True)
