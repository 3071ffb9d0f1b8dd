"""The same target tokens under inputs of several lengths.

A target block is TARGETS consecutive tokens. Every document is cut into consecutive spans of the
longest input; the block is the end of its span. The input of length L is the last L tokens up to
and including the block, of which only the block is scored, so each length sees the same targets
with more or less context before them. Special tokens that the tokenizer puts in front of a text
stand in front and count towards L.
"""

from collections.abc import Sequence
from itertools import pairwise

from maca_llmc.common.errors import UserError

TARGETS = 32


def check_lengths(
    lengths: Sequence[int], context: int | None, *, targets: int = TARGETS, prefix: int = 0
) -> None:
    """Check that lengths are usable before any work.

    :param lengths: of inputs, in tokens
    :param context: the model's, in tokens; None when its config does not say
    :param targets: tokens scored at the end of each input
    :param prefix: special tokens in front of each
    :raises UserError: none, not increasing, too short for a block, or beyond the context
    """
    if not lengths:
        raise UserError("--lengths: give at least one length, e.g. 64,256,1024")
    if lengths[0] <= 0:
        raise UserError(f"--lengths: {lengths[0]} is not positive")
    for shorter, longer in pairwise(lengths):
        if longer <= shorter:
            raise UserError(f"--lengths: {longer} after {shorter} is not increasing")
    least = targets + max(prefix, 1)  # the first target needs a token before it
    if lengths[0] < least:
        raise UserError(
            f"--lengths: {lengths[0]} is too short for {targets} scored tokens and"
            f" {max(prefix, 1)} before them: use at least {least}"
        )
    if context is not None and lengths[-1] > context:
        raise UserError(f"--lengths: {lengths[-1]} is longer than the model's context {context}")


def cut_spans(
    documents: Sequence[Sequence[int]], prefix: int, longest: int, windows: int
) -> list[list[int]]:
    """The first ``windows`` spans, round-robin over documents: first spans first, then second ones.

    :param documents: token ids of each
    :param prefix: special tokens in front of each input
    :param longest: the longest input in tokens; a span has this less the prefix
    :raises UserError: the documents have fewer spans than that; it names how many there are
    """
    width = longest - prefix
    counts = [len(document) // width for document in documents]
    if sum(counts) < windows:
        raise UserError(
            f"the text has {sum(counts)} spans of {longest} tokens, {windows} windows were asked:"
            " lower --windows, shorten --lengths or give a longer --text"
        )
    spans = []
    for turn in range(max(counts, default=0)):
        for document, count in zip(documents, counts, strict=True):
            if turn < count:
                spans.append(list(document[turn * width : (turn + 1) * width]))
    return spans[:windows]


def window_input(prefix: Sequence[int], span: Sequence[int], length: int) -> list[int]:
    """The input of ``length`` tokens that ends where the span ends."""
    return [*prefix, *span[len(span) - (length - len(prefix)) :]]
