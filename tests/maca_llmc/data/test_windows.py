import pytest

from maca_llmc.common.errors import UserError
from maca_llmc.data.windows import (
    WindowCutter,
    crowding,
    cut_windows,
    take_whole,
    window_counts,
)


def numbered(*lengths):
    """Token lists in which no token occurs twice."""
    start, result = 0, []
    for length in lengths:
        result.append(list(range(start, start + length)))
        start += length
    return result


class TestWindowCounts:
    def test_equal_tokens(self):
        assert window_counts((128, 256, 512, 1024, 2048), 65_536, "tokens") == {
            128: 102,
            256: 51,
            512: 26,
            1024: 13,
            2048: 6,
        }

    def test_equal_counts(self):
        assert window_counts((10, 20), 100, "counts") == {10: 3, 20: 3}

    def test_one_length_is_the_budget(self):
        assert window_counts((512,), 65_536, "tokens") == {512: 128}

    @pytest.mark.parametrize("balance", ["tokens", "counts"])
    def test_at_least_one_each(self, balance):
        assert window_counts((1, 1000), 10, balance)[1000] == 1

    def test_unknown_balance(self):
        with pytest.raises(UserError, match=r"balance is 'even': give 'tokens' or 'counts'"):
            window_counts((1,), 1, "even")


class TestCutWindows:
    def test_lengths_and_order(self):
        windows = cut_windows(numbered(50, 50), {5: 4, 20: 2}).windows
        assert [len(window) for window in windows] == [20, 20, 5, 5, 5, 5]

    def test_no_token_twice_and_no_window_across_documents(self):
        documents = numbered(33, 7, 64, 20, 20, 11)
        windows = cut_windows(documents, {4: 10, 8: 5, 16: 4}).windows
        tokens = [token for window in windows for token in window]
        assert len(tokens) == len(set(tokens)) == 4 * 10 + 8 * 5 + 16 * 4
        for window in windows:
            assert window == list(range(window[0], window[0] + len(window)))
            assert any(set(window) <= set(document) for document in documents)

    def test_every_document_once_before_any_twice(self):
        documents = numbered(40, 40, 40, 40)
        windows = cut_windows(documents, {10: 6}).windows
        assert [window[0] // 40 for window in windows] == [0, 1, 2, 3, 0, 1]

    def test_short_windows_prefer_documents_not_cut_yet(self):
        windows = cut_windows(numbered(40, 40, 10, 10), {40: 1, 10: 3}).windows
        assert [window[0] // 40 for window in windows] == [0, 1, 2, 2]
        assert windows[-2:] == [list(range(80, 90)), list(range(90, 100))]

    def test_uses_up_everything_when_it_must(self):
        windows = cut_windows(numbered(32, 16, 16), {16: 2, 8: 2, 4: 4}).windows
        assert sorted(token for window in windows for token in window) == list(range(64))

    def test_reads_no_more_than_it_needs(self):
        read = []

        def endless():
            number = 0
            while True:
                read.append(number)
                yield [number] * 30
                number += 1

        cut_windows(endless(), {10: 4, 20: 3})
        assert len(read) == 7

    def test_overhead_shortens_windows_and_counts(self):
        windows = cut_windows(numbered(9, 9), {10: 2}, overhead=1).windows
        assert [len(window) for window in windows] == [9, 9]
        with pytest.raises(UserError, match=r"length 11 .* \(10 tokens\)"):
            cut_windows(numbered(9, 9), {11: 1}, overhead=1)

    def test_longer_than_any_text(self):
        with pytest.raises(UserError, match=r"length 32 is longer than any text at hand \(20 tok"):
            cut_windows(numbered(20, 12), {8: 1, 32: 1})

    def test_too_little_text_says_what_there_is(self):
        with pytest.raises(UserError) as caught:
            cut_windows(numbered(20, 20), {8: 2, 16: 3})
        message = str(caught.value)
        assert "2 windows of 16 tokens where 3 are needed" in message
        assert "2 of 8, 3 of 16" in message and "40 tokens" in message and "lower" in message

    def test_no_text(self):
        with pytest.raises(UserError, match="no text"):
            cut_windows([[], []], {8: 1})

    def test_cutter_returns_none_at_the_end(self):
        cutter = WindowCutter(numbered(5), [3])
        assert cutter.cut(3) == ([0, 1, 2], 1)
        assert cutter.cut(3) is None


class TestCrowding:
    """Windows that come from few documents, where the others are too short."""

    def test_one_long_document_among_short_ones(self):
        cut = cut_windows(numbered(*[35] * 800, 4000), {64: 4, 128: 2})
        assert (cut.read, cut.usable, cut.used) == (801, 1, 1)
        assert "6 windows come from 1 of 801 documents" in crowding(cut)
        assert "lower --lengths" in crowding(cut)

    def test_one_length_of_several(self):
        cut = cut_windows(numbered(*[35] * 40, 4000), {8: 60, 128: 6})
        assert "6 windows of 128 tokens come from 1 of 41 documents" in crowding(cut)

    @pytest.mark.parametrize("documents", [[4000], [400] * 10, [200] * 300])
    def test_few_documents_or_long_ones_are_no_fault(self, documents):
        assert crowding(cut_windows(numbered(*documents), {8: 40, 64: 6, 128: 3})) is None


class TestTakeWhole:
    def test_natural_lengths_within_the_budget(self):
        assert [len(d) for d in take_whole(numbered(5, 9, 7, 2), 21, None).windows] == [5, 9, 7]

    def test_the_document_that_would_exceed_ends_the_set(self):
        assert [len(d) for d in take_whole(numbered(5, 9, 7, 2), 20, None).windows] == [5, 9]

    def test_cut_at_the_limit_overhead_included(self):
        assert [len(d) for d in take_whole(numbered(5, 9, 7), 20, 7, overhead=1).windows] == [
            5,
            6,
            6,
        ]

    def test_empty_documents_are_passed_over(self):
        cut = take_whole([[], [1, 2], []], 2, None)
        assert (cut.windows, cut.origins, cut.read, cut.usable) == ([[1, 2]], [2], 2, 1)

    @pytest.mark.parametrize(
        ("documents", "message"),
        [
            (numbered(30, 5), "first document has 30 tokens and the budget is 20"),
            (numbered(5, 9), "2 whole documents of 14 tokens in all where 20 are wanted"),
            ([[], []], "no text"),
        ],
    )
    def test_errors(self, documents, message):
        with pytest.raises(UserError, match=message):
            take_whole(documents, 20, None)
