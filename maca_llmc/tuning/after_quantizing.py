"""Quantize and tune in one go: the checkpoint in between lies hidden beside the output."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from maca_llmc.budget.recipe import with_budget_recipe
from maca_llmc.common.errors import UserError
from maca_llmc.options import Effort, QuantizeOptions, with_fields
from maca_llmc.run import quantize_run
from maca_llmc.run.output import check_output, resolve_output
from maca_llmc.tuning.run import tune


def quantize(output: str | Path, options: QuantizeOptions | None = None, **fields: Any) -> Path:
    """Quantize a model by a recipe and write a compressed-tensors checkpoint.

    Finished layers are kept in a hidden folder beside ``output`` until the end, so that a run that
    is killed can go on with ``resume=True``. Its tensors are then, bit for bit, those of a run that
    was not killed.

    :param output: folder to make; a run that fails or is interrupted leaves none
    :param options: see :class:`QuantizeOptions`
    :param fields: of the options, by name, in place of theirs
    :return: ``output``
    :raises UserError: for anything the user can mend: bad input before anything is written, a full
        disk or exhausted memory with the finished layers kept
    """
    options = with_fields(options, fields)
    if options.choose is not None and options.bits is None and options.size is None:
        raise UserError(f"--choose {options.choose}: give --bits or --size with it")
    if options.bits is None and options.size is None:
        return _quantize(output, options)
    check_output(
        resolve_output(output), (options.model, options.data), options.overwrite, options.resume
    )
    with tempfile.TemporaryDirectory() as folder:
        return _quantize(output, with_budget_recipe(options, Path(folder)))


def _quantize(output: str | Path, options: QuantizeOptions) -> Path:
    if options.tune is None:
        return quantize_run.quantize(output, options)
    return _quantize_and_tune(output, options)


def _quantize_and_tune(output: str | Path, options: QuantizeOptions) -> Path:
    given, output = Path(output).expanduser().absolute(), resolve_output(output)
    effort = _effort(options.tune)
    tokens = options.tokens if options.tune_tokens is None else options.tune_tokens
    if tokens < 1:
        raise UserError(f"--tune-tokens {tokens}: give a number of tokens such as 16384")
    between = output.with_name(f".{output.name}.untuned")
    check_output(
        output,
        (options.model, options.data),
        options.overwrite,
        options.resume and between.exists(),
    )
    quantize_run.quantize(between, replace(options, overwrite=not options.resume))
    tune(
        between,
        output,
        base=str(options.model),
        end_to_end=effort is Effort.FULL,
        data=options.data,
        lengths=options.lengths,
        tokens=tokens,
        text_column=options.text_column,
        split=options.split,
        config_name=options.config_name,
        seed=options.seed,
        device=options.device,
        overwrite=options.overwrite,
        resume=options.resume,
    )
    shutil.rmtree(between)
    return given


def _effort(name: Effort | str | None) -> Effort:
    try:
        return Effort(str(name))
    except ValueError:
        raise UserError(f"--tune {name}: give light or full") from None
