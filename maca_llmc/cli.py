"""The ``maca-llmc`` command."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import maca_llmc
from maca_llmc.common import defaults
from maca_llmc.common.command import version_option
from maca_llmc.common.errors import UserError
from maca_llmc.common.files import unwritable_parent, write_json
from maca_llmc.options import Balance, Effort, QuantizeOptions

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)

UsageError: Any = typer.BadParameter.__base__  # of typer's own copy of click
INTERRUPTED = 130
CHECKPOINT_NEXT = (
    "does it load here: maca-serve doctor {folder}   (in the serve environment, .venv-serve)\n"
    "serve it:          maca-serve up {folder}"
)


def main() -> None:
    """Run the command; what the user can mend is one line on standard error and exit code 2."""
    if find_spec("llmcompressor") is None:
        sys.exit(_fail(maca_llmc.MISSING))
    # llm-compressor logs to standard output once it is imported; the command shows its warnings
    # itself, once each. In anyone else's program its logging is left alone.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ["PYTHONSAFEPATH"] = "1"  # no child takes modules from the current folder
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up, and says what is kept
    try:
        words = sys.argv[1:] or ["--help"]
        code = app(words, prog_name="maca-llmc", standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "maca-llmc"
        code = _fail(f"{error.format_message()} (see {command} --help)")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer may have turned the KeyboardInterrupt into it
        _fail("interrupted")
    sys.exit(code)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 2


def _showing_warnings(call: Callable[..., Any]) -> Callable[..., Any]:
    """Have llm-compressor's warnings shown, and nothing else of what it logs.

    :param call: of ours, so that llm-compressor is imported: it sets up logging when it is
    """
    from maca_llmc.common.progress import log_warnings_once  # brings torch

    log_warnings_once()
    return call


def _check_file(output: Path) -> None:
    """Refuse what cannot become a file, before anything is computed for it."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give a file")
    if parent := unwritable_parent(output):
        raise UserError(f"--output {output} cannot be written in {parent}: give another one")


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: give whole numbers such as 128,512,2048") from None


def _versions() -> dict[str, str]:
    from maca_llmc.common import record  # brings torch

    return record.versions()


@app.callback()
def command(version: Annotated[bool, version_option(_versions)] = False) -> None:
    """Quantize a model with length-aware calibration, and see how far it is from its base."""


Model = Annotated[
    str | None,
    typer.Argument(help="Folder, hub name, or the embedded model.", show_default=defaults.MODEL),
]
ModelOption = Annotated[str | None, typer.Option("--model", hidden=True)]
Recipe = Annotated[
    Path | None,
    typer.Option(help="YAML recipe. Default: W4A16 by MaCa, fitting group size."),
]
Scheme = Annotated[
    str | None,
    typer.Option(help="Instead of a recipe: W4A16, W3A16, W8A8, NVFP4A16 or another preset."),
]
Bits = Annotated[
    float | None,
    typer.Option(help="A budget instead: bits a weight, scales and all; schemes by part."),
]
Size = Annotated[str | None, typer.Option(help="So, of the whole checkpoint, such as 5.2GB.")]
Choose = Annotated[
    str | None,
    typer.Option(help=f"Schemes that the budget is spent on. Default: {defaults.CHOICES}."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text, JSONL, JSON, CSV, parquet, folder or hub data set. Default: our sample."
    ),
]
Lengths = Annotated[
    str | None,
    typer.Option(help="Calibration lengths. Default: 128,256,512,1024,2048 within context."),
]
Scales = Annotated[str | None, typer.Option("--scales", hidden=True)]
Tokens = Annotated[int, typer.Option(help="Calibration budget in tokens.")]
Balanced = Annotated[Balance, typer.Option(help="What each length gets the same of.")]
WholeDocuments = Annotated[
    bool, typer.Option("--whole-documents", help="Documents at their natural length.")
]
TextColumn = Annotated[str | None, typer.Option(help="Default: text, messages or conversations.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
ConfigName = Annotated[str | None, typer.Option(help="Config of a hub data set.")]
BatchTokens = Annotated[
    int | None,
    typer.Option(help="Tokens that go through a layer together. Default: 2048, on a GPU 16384."),
]
CacheGB = Annotated[
    float | None,
    typer.Option(
        help="GB of hidden states in the host's memory, the rest on disk. Default: half of what"
        " is free; those that take a quarter of a GPU's free memory at most stay there."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the data's order.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Container = Annotated[
    int | None,
    typer.Option(help="4: store 2- and 3-bit weights in 4-bit containers, same values."),
]
AllowUnfused = Annotated[
    bool,
    typer.Option(
        "--allow-unfused", help="Unlike schemes for what vLLM makes one of, which it won't load."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier checkpoint in it when done.")
]


def _either(given: str | None, alias: str | None, name: str, older: str) -> str | None:
    """What was given under one of two names.

    :raises UserError: when both were given and differ
    """
    if given is not None and alias is not None and given != alias:
        raise UserError(f"{name} is {given!r} and {older} is {alias!r}: give one")
    return alias if given is None else given


def _model(argument: str | None, option: str | None) -> str:
    model = _either(argument, option, "MODEL", "--model")
    return defaults.MODEL if model is None else model


@app.command()
def quantize(
    output: Annotated[Path, typer.Option(help="Folder to make for the checkpoint.")],
    model: Model = None,
    model_option: ModelOption = None,
    recipe: Recipe = None,
    scheme: Scheme = None,
    bits: Bits = None,
    size: Size = None,
    choose: Choose = None,
    data: Data = None,
    lengths: Lengths = None,
    scales: Scales = None,
    tokens: Tokens = defaults.TOKENS,
    balance: Balanced = Balance.TOKENS,
    whole_documents: WholeDocuments = False,
    text_column: TextColumn = None,
    split: Split = "train",
    config_name: ConfigName = None,
    batch_tokens: BatchTokens = None,
    cache_gb: CacheGB = None,
    seed: Seed = 0,
    device: Device = "auto",
    container: Container = None,
    allow_unfused: AllowUnfused = False,
    record_diagonals: Annotated[
        bool,
        typer.Option(
            "--record-diagonals",
            help="Write what each length sees of a few modules, for the report of maca-serve.",
        ),
    ] = False,
    tune: Annotated[
        Effort | None,
        typer.Option(help="Then tune what was rounded: blocks, or blocks and scales end to end."),
    ] = None,
    tune_tokens: Annotated[
        int | None, typer.Option(help="Budget of tuning in tokens. Default: that of calibration.")
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last layer a killed run finished.")
    ] = False,
) -> None:
    """Quantize MODEL by a recipe and write a checkpoint that vLLM loads."""
    options = QuantizeOptions(
        model=_model(model, model_option),
        recipe=recipe,
        scheme=scheme,
        bits=bits,
        size=size,
        choose=choose,
        data=data,
        lengths=_numbers(_either(lengths, scales, "--lengths", "--scales"), "--lengths"),
        tokens=tokens,
        balance=balance,
        whole_documents=whole_documents,
        text_column=text_column,
        split=split,
        config_name=config_name,
        batch_tokens=batch_tokens,
        cache_gb=cache_gb,
        seed=seed,
        device=device,
        container=container,
        allow_unfused=allow_unfused,
        record_diagonals=record_diagonals,
        tune=tune,
        tune_tokens=tune_tokens,
        overwrite=overwrite,
        resume=resume,
    )
    _print_written(_showing_warnings(maca_llmc.quantize)(output, options))


@app.command("plan")
def plan_run(
    model: Model = None,
    model_option: ModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where it would go: is that free, is there disk? Default: disk here."),
    ] = None,
    recipe: Recipe = None,
    scheme: Scheme = None,
    bits: Bits = None,
    size: Size = None,
    choose: Choose = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier", help="Show what each number of bits would cost; loads the weights."
        ),
    ] = False,
    data: Data = None,
    lengths: Lengths = None,
    scales: Scales = None,
    tokens: Tokens = defaults.TOKENS,
    balance: Balanced = Balance.TOKENS,
    whole_documents: WholeDocuments = False,
    text_column: TextColumn = None,
    split: Split = "train",
    config_name: ConfigName = None,
    batch_tokens: BatchTokens = None,
    cache_gb: CacheGB = None,
    device: Device = "auto",
    container: Container = None,
    allow_unfused: AllowUnfused = False,
    overwrite: Overwrite = False,
) -> None:
    """What quantize would do to MODEL with the same flags, and what it would take.

    Loads no weights, unless there is a budget to spend.
    """
    from maca_llmc.planning.plan_table import print_plan  # brings torch, which takes seconds

    options = QuantizeOptions(
        model=_model(model, model_option),
        recipe=recipe,
        scheme=scheme,
        bits=bits,
        size=size,
        choose=choose,
        data=data,
        lengths=_numbers(_either(lengths, scales, "--lengths", "--scales"), "--lengths"),
        tokens=tokens,
        balance=balance,
        whole_documents=whole_documents,
        text_column=text_column,
        split=split,
        config_name=config_name,
        batch_tokens=batch_tokens,
        cache_gb=cache_gb,
        device=device,
        container=container,
        allow_unfused=allow_unfused,
        overwrite=overwrite,
    )
    if frontier:
        _print_frontier(options)
        return
    print_plan(_showing_warnings(maca_llmc.plan)(output, options))


@app.command()
def tune(
    checkpoint: Annotated[Path, typer.Argument(help="Quantized checkpoint folder.")],
    output: Annotated[Path, typer.Option(help="Folder to make for the tuned checkpoint.")],
    base: Annotated[
        str, typer.Option(help="The unquantized model: folder, hub name, or the embedded model.")
    ] = defaults.MODEL,
    blocks: Annotated[
        bool, typer.Option(help="Tune where weights are rounded, layer by layer.")
    ] = True,
    end_to_end: Annotated[
        bool, typer.Option(help="Tune scales by KL divergence to the base.")
    ] = True,
    data: Data = None,
    lengths: Lengths = None,
    tokens: Tokens = defaults.TOKENS,
    text_column: TextColumn = None,
    split: Split = "train",
    config_name: ConfigName = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run was.")] = False,
) -> None:
    """Tune CHECKPOINT towards BASE: same format, same size, same kernels, closer answers."""
    folder = _showing_warnings(maca_llmc.tune)(
        checkpoint,
        output,
        base=base,
        blocks=blocks,
        end_to_end=end_to_end,
        data=data,
        lengths=_numbers(lengths, "--lengths"),
        tokens=tokens,
        text_column=text_column,
        split=split,
        config_name=config_name,
        seed=seed,
        device=device,
        overwrite=overwrite,
        resume=resume,
    )
    _print_written(folder)


@app.command()
def evaluate(
    base: Annotated[str, typer.Argument(help="The unquantized model.")],
    checkpoints: Annotated[list[Path], typer.Argument(help="Quantized checkpoint folders.")],
    text: Annotated[
        str | None, typer.Option(help="Evaluation text or JSONL. Default: the shipped sample.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Input lengths in tokens.")] = ",".join(
        map(str, defaults.EVALUATION_LENGTHS)
    ),
    windows: Annotated[
        int, typer.Option(help="How many target blocks.")
    ] = defaults.EVALUATION_WINDOWS,
    targets: Annotated[
        int, typer.Option(help="Tokens of a target block.")
    ] = defaults.EVALUATION_TARGETS,
    tasks: Annotated[
        str | None, typer.Option(help="Multiple choice: JSONL files, with commas between.")
    ] = None,
    limit: Annotated[
        int, typer.Option(help="At most this many questions of each task.")
    ] = defaults.EVALUATION_LIMIT,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """KL divergence to BASE, perplexity of the same tokens by input length, multiple choice."""
    if output is not None:
        _check_file(output)
    results = maca_llmc.evaluate(
        base,
        checkpoints,
        text=text,
        lengths=_numbers(lengths, "--lengths") or [],
        windows=windows,
        targets=targets,
        tasks=tasks.split(",") if tasks else (),
        limit=limit,
        device=device,
    )
    _print_table(results)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, results)


@app.command("embedded-model")
def embedded_model(
    link: Annotated[Path, typer.Argument(help="Link to make, for commands that want a folder.")],
) -> None:
    """Convert the embedded model on first use and link to its folder in the cache."""
    from maca_llmc.model import smollm2

    folder = smollm2.embedded_model()
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if link.exists():
        raise UserError(f"{link} exists and is no link: give another name")
    link.symlink_to(folder)
    Console().print(f"{link} -> {folder}", highlight=False, soft_wrap=True)


def _print_written(folder: Path) -> None:
    console = Console()
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    console.print(f"wrote {folder} ({size:.0f} MB)", highlight=False, soft_wrap=True)
    console.print(CHECKPOINT_NEXT.format(folder=folder), highlight=False, soft_wrap=True)


def _print_frontier(options: QuantizeOptions) -> None:
    from maca_llmc.budget.recipe import frontier

    title = "what bits would cost: rounding alone, to second order; compare, do not believe"
    table = Table("bits a weight", "KL to the base, nats a token", title=title)
    for bits, expected in frontier(options):
        table.add_row(f"{bits:.3f}", f"{expected:.4g}")
    Console().print(table)


def _print_table(results: dict[str, Any]) -> None:
    lengths = [str(length) for length in results["settings"]["lengths"]]
    entries = results["checkpoints"]
    columns = [f"{length} tokens" for length in lengths]
    for title, key, value in (
        ("KL divergence to the base, nats per token", "kl", "mean"),
        ("perplexity", "perplexity", "ppl"),
    ):
        cells = [[(e[key][n][value], e[key][n]["stderr"]) for n in lengths] for e in entries]
        _print_cells(f"{title} (± standard error over windows)", columns, entries, cells)
    tasks = results["settings"]["tasks"]
    for title, key in (("accuracy", "acc"), ("accuracy by byte of the choice", "acc_norm")):
        found = [[e["tasks"][task] for task in tasks] for e in entries]
        cells = [[(task[key], task[f"{key}_stderr"]) for task in row] for row in found]
        if tasks:
            _print_cells(f"{title} (± standard error over questions)", tasks, entries, cells)


def _print_cells(
    title: str,
    columns: Iterable[str],
    entries: list[dict[str, Any]],
    cells: list[list[tuple[float, float]]],
) -> None:
    table = Table("checkpoint", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for entry, row in zip(entries, cells, strict=True):
        table.add_row(entry["name"], *(f"{value:.4g} ± {error:.2g}" for value, error in row))
    Console().print(table)
