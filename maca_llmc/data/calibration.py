"""The calibration set: which token sequences the model sees, in which order, and their record."""

from __future__ import annotations

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from maca_llmc.common import defaults
from maca_llmc.common.errors import UserError
from maca_llmc.common.tokens import encode, special_tokens, without_prefix
from maca_llmc.data.chats import render
from maca_llmc.data.rows import Document
from maca_llmc.data.sources import Source, describe_source, read_documents
from maca_llmc.data.windows import crowding, cut_windows, take_whole, window_counts


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences in a fixed order, and where they came from.

    :param sequences: 1-D int64 tensors, unpadded.
    :param source: the data in a few words.
    :param scales: the lengths asked for, in tokens; ``None`` for uncut whole documents.
    :param special_prefix: token ids that open every sequence (BOS), counted in its length.
    :param documents: how many there are in the data, were read, are usable (long enough for the
        shortest window) and were used.
    """

    sequences: list[Tensor]
    source: str
    seed: int
    scales: tuple[int, ...] | None
    balance: str
    whole_documents: bool
    special_prefix: tuple[int, ...]
    documents: dict[str, int]

    @property
    def lengths(self) -> list[int]:
        """The length of every sequence, in tokens, in order."""
        return [len(sequence) for sequence in self.sequences]

    def dataloader(self, batch_tokens: int = 1) -> DataLoader:
        """Return a loader to pass to ``oneshot(dataset=...)``: it cuts and pads nothing.

        A batch is ``{"input_ids": [rows, length], "attention_mask": [rows, length]}``, int64, the
        mask all 1. Sequences of the same length share a batch, in their order: so nothing is
        padded, and attention needs no ``[length, length]`` mask.

        :param batch_tokens: most tokens in a batch; a longer sequence is a batch of its own
        :raises UserError: when it is not positive.
        """
        if batch_tokens < 1:
            raise UserError(f"batch tokens are {batch_tokens}: give 1 or more")
        batches = batches_of_equal_length(self.lengths, batch_tokens)
        return DataLoader(
            self.sequences,  # type: ignore[arg-type]  # a list is a map-style data set
            batch_sampler=batches,
            collate_fn=_stack,
            # Iterating draws a seed for workers: not from the global generator.
            generator=torch.Generator(),
        )

    def record(self) -> dict[str, Any]:
        """Return what a run record says about the data; JSON-able.

        ``lengths`` counts sequences by length, or by power-of-two bucket (``"513-1024"``) for
        whole documents. ``sha256`` is over the sequences in order, each as its length and its
        token ids in little-endian int64.
        """
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(struct.pack(f"<{len(sequence) + 1}q", len(sequence), *sequence.tolist()))
        histogram = Counter(sorted(self.lengths))
        lengths: Counter[str] = Counter()
        for length, count in histogram.items():
            lengths[_bucket(length) if self.whole_documents else str(length)] += count
        return {
            "source": self.source,
            "sha256": digest.hexdigest(),
            "seed": self.seed,
            "sequences": len(self.sequences),
            "tokens": sum(self.lengths),
            "lengths": dict(lengths),
            "scales": None if self.scales is None else list(self.scales),
            "balance": self.balance,
            "whole_documents": self.whole_documents,
            "special_prefix": list(self.special_prefix),
            "documents": self.documents,
        }


def build_calibration_set(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source = None,
    scales: Sequence[int] | None = defaults.SCALES,
    tokens: int = defaults.TOKENS,
    balance: str = "tokens",
    whole_documents: bool = False,
    seed: int = 0,
    max_context: int | None = None,
    text_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
) -> CalibrationSet:
    """Build the calibration set: the same arguments give the same sequences in the same order.

    Documents are tokenized one by one, in seeded order, only as many as are needed. Special tokens
    that the tokenizer puts in front of a text (BOS) open every sequence and count in its length.
    Chats go through the tokenizer's chat template.

    Windows are cut from the front of what is left of a document, the longest first, spread over
    the documents, never a token twice; then they are shuffled, so that lengths are mixed.

    :param source: see :func:`read_documents`; ``None`` is the shipped English sample.
    :param scales: window lengths in tokens, strictly increasing; one length gives a fixed-length
        set. With ``whole_documents``, documents are cut at the last; ``None`` cuts at
        ``max_context``.
    :param tokens: the budget, in tokens. Windows come to it within half a window per length (but
        each length gets at least one window); whole documents stay within it.
    :param balance: ``"tokens"`` (equal tokens per length) or ``"counts"`` (equal numbers of
        windows); no meaning for whole documents.
    :param whole_documents: take documents at their natural length instead of windows.
    :param seed: of the order of documents and of windows. Global generators are left alone.
    :param max_context: the model's context, in tokens; no scale may exceed it.
    :param text_column: see :func:`read_documents`; so ``split`` and ``config_name``.
    :raises UserError: scales that make no sense, budget below the smallest scale, too little
        text, chats without a chat template, and whatever :func:`read_documents` raises.
    """
    prefix, _ = special_tokens(tokenizer)
    _check_scales(scales, tokens, whole_documents, max_context, len(prefix))
    documents = read_documents(
        source, text_column=text_column, split=split, config_name=config_name
    )
    generator = random.Random(seed)
    order = list(range(len(documents)))
    generator.shuffle(order)
    stream = (tokenize(tokenizer, documents[index], prefix) for index in order)
    if whole_documents:
        limit = max_context if scales is None else scales[-1]
        cut = take_whole(stream, tokens, limit, len(prefix))
    else:
        assert scales is not None  # _check_scales saw to it
        cut = cut_windows(stream, window_counts(scales, tokens, balance), len(prefix))
        if warning := crowding(cut):
            logger.warning(f"{describe_source(source)}: {warning}")
    bodies = list(cut.windows)
    generator.shuffle(bodies)
    return CalibrationSet(
        sequences=[torch.tensor([*prefix, *body], dtype=torch.long) for body in bodies],
        source=describe_source(source, split=split, config_name=config_name),
        seed=seed,
        scales=None if scales is None else tuple(scales),
        balance=balance,
        whole_documents=whole_documents,
        special_prefix=tuple(prefix),
        documents={
            "given": len(documents),
            "read": cut.read,
            "usable": cut.usable,
            "used": cut.used,
        },
    )


def batches_of_equal_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Put the numbers of sequences of one length together, ``batch_tokens`` tokens at most."""
    batches: list[list[int]] = []
    growing: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        batch = growing.get(length)
        if batch is None or (len(batch) + 1) * length > batch_tokens:
            batch = growing[length] = []
            batches.append(batch)
        batch.append(index)
    return batches


def tokenize(
    tokenizer: PreTrainedTokenizerBase, document: Document, prefix: list[int]
) -> list[int]:
    """Return the token ids of one document without ``prefix``, whatever its length.

    A text or a chat template that has the prefix itself loses it here, so that no sequence opens
    with two of them.

    :raises UserError: a chat and no chat template, or a chat that does not fit it.
    """
    if not document:
        return []
    text = document if isinstance(document, str) else render(tokenizer, document)
    return without_prefix(encode(tokenizer, text), prefix)


def check_ids(sequences: Iterable[Sequence[int]], tokenizer: Any, rows: int, base: str) -> None:
    """Refuse tokens that the model has no embedding for.

    :param sequences: token ids.
    :param rows: of the embedding; more than the tokenizer has tokens do no harm.
    :param base: the model, for messages.
    :raises UserError: names the token and its id.
    """
    largest = max((int(max(ids)) for ids in sequences if len(ids)), default=-1)
    # An added token may lack a row where no text uses it, such as Gemma 3's image token.
    if (own := tokenizer.vocab_size - 1) > largest and own >= rows:
        largest = own
    if largest >= rows:
        raise UserError(
            f"model {base} has embeddings for ids below {rows} (vocab_size) and its tokenizer "
            f"gives {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}): give the tokenizer "
            "that belongs to it, or resize the model's embeddings"
        )


def _check_scales(
    scales: Sequence[int] | None,
    tokens: int,
    whole_documents: bool,
    max_context: int | None,
    overhead: int,
) -> None:
    if tokens < 1:
        raise UserError(f"the token budget is {tokens}: give a positive number")
    if scales is None:
        if not whole_documents:
            raise UserError("no lengths: give window lengths, or ask for whole documents")
        return
    shown = ",".join(map(str, scales))
    if not scales or min(scales) < 1:
        raise UserError(f"lengths {shown or '(none)'}: give positive lengths such as 128,512,2048")
    if any(after <= before for before, after in pairwise(scales)):
        raise UserError(f"lengths {shown} are not increasing: sort them and drop repeats")
    if max_context is not None and scales[-1] > max_context:
        raise UserError(
            f"length {scales[-1]} is longer than the model's context ({max_context}): lower it"
        )
    if scales[0] <= overhead:
        raise UserError(
            f"length {scales[0]} leaves no room for text after {overhead} special tokens: raise it"
        )
    if not whole_documents and tokens < scales[0]:
        raise UserError(
            f"the token budget ({tokens}) is below the shortest length ({scales[0]}): "
            "raise the one or lower the other"
        )


def _stack(rows: list[Tensor]) -> dict[str, Tensor]:
    input_ids = torch.stack(rows)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _bucket(length: int) -> str:
    """Name the power-of-two bucket of a length: 513 to 1024 is ``"513-1024"``."""
    top = 1 << (length - 1).bit_length()
    return f"{top // 2 + 1}-{top}"
