"""Progress by layer, with an estimate of what is left, in place of one bar per batch."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tqdm
from compressed_tensors.utils import patch_attr
from loguru import logger

from maca_llmc.common.record import describe_lengths

NOT_NEWS = ("No accelerator available", "Disabling tokenizer", "Calibration pipeline is set to")
"""How warnings begin that there is nothing to do about."""


@contextmanager
def layer_progress(
    layers: list[torch.nn.Module], batches: int, passes: int = 2, finished: int = 0
) -> Iterator[None]:
    """Show one bar over all layers while llm-compressor's own bars and chatter are quiet.

    :param layers: the decoder layers in order
    :param batches: calibration batches that go through each
    :param passes: how often, the last of them to pass outputs on (but for the last layer)
    :param finished: layers that are only passed through, their calibration done in an earlier run
    """
    bar = tqdm.tqdm(
        total=(len(layers) * passes - 1 - finished * (passes - 1)) * batches,
        desc=f"layer 1/{len(layers)}",
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed} elapsed, {remaining} left",
        mininterval=0.5 if sys.stderr.isatty() else 15,
    )
    handles = [
        layer.register_forward_hook(_advance(bar, index, len(layers)))
        for index, layer in enumerate(layers)
    ]
    try:
        with quiet():
            yield
        bar.update(max(bar.total - bar.n, 0))
    finally:
        bar.close()
        for handle in handles:
            handle.remove()


@contextmanager
def reading_progress(what: str, files: list[Path]) -> Iterator[Callable[[int], Any]]:
    """Show one bar over all bytes of some files, unless they are read within a second.

    :return: to be told how many more bytes were read
    """
    with tqdm.tqdm(
        total=sum(file.stat().st_size for file in files),
        desc=what,
        unit="B",
        unit_scale=True,
        delay=1,
        mininterval=0.5 if sys.stderr.isatty() else 15,
    ) as bar:
        yield bar.update


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the progress bars of the libraries underneath; one opened before stays."""
    original = tqdm.tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"disable": True})

    with patch_attr(tqdm.tqdm, "__init__", disabled), warnings.catch_warnings():
        # what llm-compressor loads on the CPU counts as offloaded, which saving then warns of
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded")
        # that a checkpoint's own settings are kept, when asked to dequantize it
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield


def tell_calibration(calibration: dict[str, Any]) -> None:
    """Say on standard error how many tokens there are, and how many documents gave them.

    Whole windows rarely make a round budget.

    :param calibration: what ``CalibrationSet.record`` says
    """
    lengths = describe_lengths(calibration)
    tell(f"calibrating on {calibration['tokens']:,} tokens (count x length: {lengths})")
    tell(
        "documents: {given} given, {read} read, {usable} long enough, {used} used".format_map(
            calibration["documents"]
        )
    )


def tell(words: str) -> None:
    """Say a line on standard error, above whatever bar there is."""
    tqdm.tqdm.write(words, file=sys.stderr)


def log_warnings_once() -> None:
    """Show llm-compressor's warnings on standard error, each once, and nothing below them."""
    seen: set[str] = set()

    def first_time(record: Any) -> bool:
        message, level = record["message"], record["level"].name
        if message in seen or level == "METRIC" or message.startswith(NOT_NEWS):
            return False
        seen.add(message)
        return True

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}", filter=first_time)


def _advance(bar: Any, index: int, total: int) -> Any:
    def hook(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        bar.set_description_str(f"layer {index + 1}/{total}", refresh=False)
        bar.update(min(1, bar.total - bar.n))  # a smoother's checks run a layer once more, too

    return hook
