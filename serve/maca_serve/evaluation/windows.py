"""The same target tokens under inputs of several lengths.

A target block is TARGETS consecutive tokens. Every document is cut into consecutive spans of the
longest input; the block is the end of its span. The input of length L is the last L tokens up to
and including the block, of which only the block is scored, so each length sees the same targets
with more or less context before them. Special tokens that the tokenizer puts in front of a text
stand in front and count towards L. The quantize side (`maca-llmc evaluate`) cuts the same
windows.
"""

from itertools import pairwise

from maca_serve.common.errors import UserError
from maca_serve.evaluation.corpus import Tokens

TARGETS = 32
CONTEXT = "context"


def resolve_lengths(lengths: tuple[int | str, ...], context: int | None) -> tuple[int, ...]:
    """Lengths with the model's context in place of the word `context`, checked.

    Args:
        lengths: input lengths in tokens, or that word.
        context: the model's context in tokens, None when its config does not say.

    Raises:
        UserError: another word, that word without a known context, or as `check_lengths`.
    """
    numbers = []
    for length in lengths:
        if length == CONTEXT and context is None:
            raise UserError("--lengths: config.json says no context of the model; give a number")
        number = context if length == CONTEXT else length
        if not isinstance(number, int):
            raise UserError(f"--lengths: {length!r} is neither a number nor `{CONTEXT}`")
        numbers.append(number)
    check_lengths(tuple(numbers), context)
    return tuple(numbers)


def check_lengths(lengths: tuple[int, ...], context: int | None) -> None:
    """Check that lengths are usable before any work.

    Args:
        lengths: input lengths in tokens.
        context: the model's context in tokens, None when its config does not say.

    Raises:
        UserError: none, not increasing, too short for a block, or beyond the context.
    """
    if not lengths:
        raise UserError("--lengths: give at least one length, e.g. 64,256,1024")
    if lengths[0] <= 0:
        raise UserError(f"--lengths: {lengths[0]} is not positive")
    for shorter, longer in pairwise(lengths):
        if longer <= shorter:
            raise UserError(f"--lengths: {longer} after {shorter} is not increasing")
    if lengths[0] <= TARGETS:
        raise UserError(
            f"--lengths: {lengths[0]} leaves no context before the {TARGETS} scored tokens;"
            f" use at least {TARGETS + 1}"
        )
    if context is not None and lengths[-1] > context:
        raise UserError(f"--lengths: {lengths[-1]} is longer than the model's context {context}")


def cut_spans(tokens: Tokens, longest: int, windows: int) -> list[list[int]]:
    """The first `windows` spans, round-robin over documents: first spans first, then second ones.

    Args:
        tokens: the documents.
        longest: the longest input in tokens, prefix included; a span has this less the prefix.
        windows: how many.

    Raises:
        UserError: the documents have fewer spans than that; it names how many there are.
    """
    width = longest - len(tokens.prefix)
    counts = [len(document) // width for document in tokens.documents]
    if sum(counts) < windows:
        raise UserError(
            f"the text has {sum(counts)} spans of {longest} tokens, {windows} windows were asked:"
            " lower --windows, shorten --lengths or give a longer --text"
        )
    spans = []
    for turn in range(max(counts)):
        for document, count in zip(tokens.documents, counts, strict=True):
            if turn < count:
                spans.append(document[turn * width : (turn + 1) * width])
    return spans[:windows]


def window_input(prefix: list[int], span: list[int], length: int) -> list[int]:
    """The input of `length` tokens that ends where the span ends."""
    return prefix + span[len(span) - (length - len(prefix)) :]
