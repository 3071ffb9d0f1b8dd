"""What the command line of ``quantize`` and ``plan`` says, carried to where it is used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from maca_llmc.common import defaults


class Balance(StrEnum):
    """What each calibration length gets the same of."""

    TOKENS = "tokens"
    COUNTS = "counts"


class Effort(StrEnum):
    """How much is tuned after calibration: blocks alone, or then scales end to end as well."""

    LIGHT = "light"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantize a model.

    :param model: the embedded model's name, a folder, or a hub name
    :param recipe: YAML file; so ``scheme``, one of compressed-tensors' names, for a recipe of that
        scheme by MaCa; by default W4A16. Group sizes are the largest usual that divide the widths
    :param bits: a weight, over all that may be quantized, scales and all: schemes are then chosen
        part by part; so ``size`` of the whole checkpoint, such as "5.2GB"
    :param choose: what they are chosen from, such as "W3A16,W4A16,BF16"
    :param data: text, JSONL, folder, hub name or ``Dataset``; the shipped English sample if None
    :param lengths: calibration lengths in tokens; by default ``defaults.SCALES`` up to the context
    :param tokens: calibration budget
    :param balance: what every length gets the same of
    :param whole_documents: documents at their natural length instead of windows
    :param text_column: of the data; so ``split`` and ``config_name`` of a hub data set
    :param batch_tokens: tokens that go through a layer together, in sequences of one length;
        ``defaults.BATCH_TOKENS`` of the device if None
    :param cache_gb: hidden states to hold in memory, the rest going to disk; half of what is free
        if None
    :param seed: of the order of the data; recorded
    :param device: "auto", "cpu", "cuda" or "cuda:N"
    :param container: 4 stores 2- and 3-bit weights in 4-bit containers, same values
    :param allow_unfused: let Linears that vLLM makes one of (q, k and v; gate and up; experts) have
        schemes of their own, for readers other than vLLM
    :param record_diagonals: write the Hessian's diagonal of a few modules, by length, beside the
        checkpoint (``maca_diagonals.json``), for the report of ``maca-serve compare``
    :param tune: tune what was rounded, see :func:`maca_llmc.tune`; None does not
    :param tune_tokens: its budget; ``tokens`` if None
    :param overwrite: replace the output, a checkpoint of ours, when the new one is complete
    :param resume: go on after the last layer that a killed run of the same settings finished
    """

    model: str = defaults.MODEL
    recipe: str | Path | None = None
    scheme: str | None = None
    bits: float | None = None
    size: str | None = None
    choose: str | None = None
    data: Any = None
    lengths: Sequence[int] | None = None
    tokens: int = defaults.TOKENS
    balance: Balance | str = Balance.TOKENS
    whole_documents: bool = False
    text_column: str | None = None
    split: str = "train"
    config_name: str | None = None
    batch_tokens: int | None = None
    cache_gb: float | None = None
    seed: int = 0
    device: str = "auto"
    container: int | None = None
    allow_unfused: bool = False
    record_diagonals: bool = False
    tune: Effort | str | None = None
    tune_tokens: int | None = None
    overwrite: bool = False
    resume: bool = False


def with_fields(options: QuantizeOptions | None, fields: dict[str, Any]) -> QuantizeOptions:
    """Options, with those that a caller gave by name; ``scales`` is what ``lengths`` was called.

    :raises TypeError: names a field that there is not, or says that one is given twice
    """
    if "scales" in fields:
        if "lengths" in fields:
            raise TypeError("lengths and scales, its former name: give lengths")
        fields = {"lengths" if name == "scales" else name: fields[name] for name in fields}
    return replace(options or QuantizeOptions(), **fields)
