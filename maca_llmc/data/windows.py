"""Token lists in, windows of chosen lengths out. Pure: no tokenizer, no torch, no random numbers.

Lengths are in tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from maca_llmc.common.errors import UserError


def window_counts(scales: Sequence[int], tokens: int, balance: str) -> dict[int, int]:
    """Return how many windows of each length share a budget of ``tokens``.

    :param balance: ``"tokens"`` gives every length the same share of the tokens, to the nearest
        whole window; ``"counts"`` gives every length the same number of windows. Either way each
        length gets at least one, even if that exceeds the budget.
    :raises UserError: unknown balance.
    """
    if balance == "tokens":
        return {scale: max(1, round(tokens / len(scales) / scale)) for scale in scales}
    if balance == "counts":
        return dict.fromkeys(scales, max(1, tokens // sum(scales)))
    raise UserError(f"balance is {balance!r}: give 'tokens' or 'counts'")


@dataclass(order=True)
class Remainder:
    """What is left of a document. Sorts by when it was last cut, then by the order of arrival."""

    last_cut: int
    arrival: int
    tokens: list[int] = field(compare=False)
    start: int = field(default=0, compare=False)

    def __len__(self) -> int:
        return len(self.tokens) - self.start

    def cut(self, length: int) -> list[int]:
        """Take the next ``length`` tokens."""
        self.start += length
        return self.tokens[self.start - length : self.start]


@dataclass(frozen=True)
class Cut:
    """Windows, and the documents that gave them.

    :param windows: token lists.
    :param origins: the number of each window's document, in the order in which they were read.
    :param read: how many documents were read.
    :param usable: how many of them are long enough for the shortest window.
    """

    windows: list[list[int]]
    origins: list[int]
    read: int
    usable: int

    @property
    def used(self) -> int:
        """How many documents gave windows."""
        return len(set(self.origins))


def crowding(cut: Cut) -> str | None:
    """Say where many windows come from few documents while most gave none; ``None`` where not.

    Of all windows, or else of those of one length: fewer documents than half as many as windows,
    and fewer than a tenth of the documents read, which were too short.
    """
    origins: dict[str, list[int]] = {"": cut.origins}
    for window, origin in zip(cut.windows, cut.origins, strict=True):
        origins.setdefault(f" of {len(window)} tokens", []).append(origin)
    for which, found in origins.items():
        few = len(set(found))
        if 2 * few <= len(found) and 10 * few <= cut.read:
            return (
                f"{len(found)} windows{which} come from {few} of {cut.read} documents: the others "
                "are too short; lower --lengths, take --whole-documents, or give longer documents"
            )
    return None


class WindowCutter:
    """Cuts windows out of documents, never a token twice, and spreads them over the documents.

    A window comes from a document that was not cut yet, else from a new one, else from the one
    that was cut the longest ago. Documents are read only when needed.

    :param documents: token lists, in the order in which they are to be used.
    :param lengths: the lengths that :meth:`cut` will be asked for.
    """

    def __init__(self, documents: Iterable[list[int]], lengths: Iterable[int]) -> None:
        self._incoming = iter(documents)
        self._lengths = sorted(lengths, reverse=True)
        # A document waits under the longest length that it can still give.
        self._waiting: dict[int, list[Remainder]] = {length: [] for length in self._lengths}
        self._cuts = 0
        self.longest = 0  # of the documents read so far
        self.total = 0  # tokens of the documents read so far
        self.read = 0
        self.usable = 0  # documents that are long enough for the shortest window

    def cut(self, length: int) -> tuple[list[int], int] | None:
        """Return a window of ``length`` tokens and the number of its document, from 1.

        ``None`` when no document can give one.
        """
        best = self._least_recent(length)
        while best is None or self._waiting[best][0].last_cut > 0:
            tokens = next(self._incoming, None)
            if tokens is None:
                break
            self.read += 1
            self.usable += len(tokens) >= self._lengths[-1]
            self.longest = max(self.longest, len(tokens))
            self.total += len(tokens)
            self._wait(Remainder(0, self.read, tokens))
            best = self._least_recent(length)
        if best is None:
            return None
        remainder = heapq.heappop(self._waiting[best])
        window = remainder.cut(length)
        self._cuts += 1
        remainder.last_cut = self._cuts
        self._wait(remainder)
        return window, remainder.arrival

    def _least_recent(self, length: int) -> int | None:
        """Return the queue whose head can give ``length`` tokens and was cut the longest ago."""
        able = [each for each in self._lengths if each >= length and self._waiting[each]]
        return min(able, key=lambda each: self._waiting[each][0], default=None)

    def _wait(self, remainder: Remainder) -> None:
        for length in self._lengths:
            if len(remainder) >= length:
                heapq.heappush(self._waiting[length], remainder)
                return


def cut_windows(
    documents: Iterable[list[int]], counts: Mapping[int, int], overhead: int = 0
) -> Cut:
    """Cut ``counts[length]`` windows of each length, the longest first.

    :param documents: token lists without special tokens; read lazily, in this order.
    :param counts: number of windows by length, both at least 1.
    :param overhead: tokens of each length that the caller will add (a BOS token): windows come
        out that much shorter.
    :return: windows, longest first. No token is used twice and no window spans two documents.
    :raises UserError: no document is long enough for a length, or there are too few.
    """
    lengths = sorted(counts, reverse=True)
    cutter = WindowCutter(documents, [length - overhead for length in lengths])
    windows: list[list[int]] = []
    origins: list[int] = []
    for length in lengths:
        for done in range(counts[length]):
            found = cutter.cut(length - overhead)
            if found is None:
                raise _too_little_text(cutter, length, done, counts, overhead)
            windows.append(found[0])
            origins.append(found[1])
    return Cut(windows, origins, cutter.read, cutter.usable)


def _too_little_text(
    cutter: WindowCutter, length: int, done: int, counts: Mapping[int, int], overhead: int
) -> UserError:
    if cutter.total == 0:
        return UserError("the data hold no text: every document is empty")
    if cutter.longest + overhead < length:
        return UserError(
            f"length {length} is longer than any text at hand ({cutter.longest + overhead} tokens)"
            ": lower it or give longer documents"
        )
    wanted = ", ".join(f"{count} of {each}" for each, count in sorted(counts.items()))
    return UserError(
        f"too little text: {done} windows of {length} tokens where {counts[length]} are needed "
        f"(wanted in all: {wanted}; the data hold {cutter.total} tokens in {cutter.read} documents,"
        f" {cutter.usable} of them as long as the shortest window): "
        "lower the token budget, lower the lengths or give more text"
    )


def take_whole(
    documents: Iterable[list[int]], tokens: int, limit: int | None, overhead: int = 0
) -> Cut:
    """Take documents at their natural length until the budget is reached.

    :param documents: token lists without special tokens; read lazily, in this order. Empty ones
        are passed over.
    :param tokens: the budget. The first document that would exceed it ends the set and is left
        out: cutting it would add a length that no document has.
    :param limit: documents are cut to this length; ``None`` never cuts.
    :param overhead: tokens of each length that the caller will add (a BOS token).
    :raises UserError: the first document exceeds the budget, or the data end before it is reached.
    """
    taken: list[list[int]] = []
    origins: list[int] = []
    total = usable = 0
    for number, document in enumerate(documents, start=1):
        if not document:
            continue
        usable += 1
        if limit is not None:
            document = document[: limit - overhead]
        length = len(document) + overhead
        if total + length > tokens:
            if not taken:
                raise UserError(
                    f"the first document has {length} tokens and the budget is {tokens}: "
                    "raise the token budget or cut documents at a lower scale"
                )
            return Cut(taken, origins, number, usable)
        taken.append(document)
        origins.append(number)
        total += length
        if total == tokens:
            return Cut(taken, origins, number, usable)
    if not taken:
        raise UserError("the data hold no text: every document is empty")
    raise UserError(
        f"too little text: {len(taken)} whole documents of {total} tokens in all where {tokens} "
        "are wanted: lower the token budget or give more text"
    )
