"""Windows that end with the same targets."""

import pytest

from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.windows import TARGETS, check_lengths, cut_spans, window_input

DOCUMENTS = [list(range(1000, 1250)), list(range(2000, 2130)), list(range(3000, 3050))]


def test_spans_go_round_the_documents():
    spans = cut_spans(DOCUMENTS, 0, 100, 3)
    assert [(span[0], span[-1]) for span in spans] == [(1000, 1099), (2000, 2099), (1100, 1199)]


def test_prefix_makes_spans_shorter_and_counts_towards_the_length():
    spans = cut_spans(DOCUMENTS, 2, 100, 3)
    assert [len(span) for span in spans] == [98] * 3
    assert spans[2][0] == 1098
    window = window_input([1, 2], spans[0], 64)
    assert window == [1, 2, *range(1036, 1098)]


def test_every_length_ends_with_the_same_targets():
    span = cut_spans(DOCUMENTS, 0, 128, 1)[0]
    ends = {tuple(window_input([], span, length)[-TARGETS:]) for length in (33, 64, 100, 128)}
    assert ends == {tuple(range(1096, 1128))}


def test_too_few_spans_are_counted():
    with pytest.raises(UserError, match="has 3 spans of 100 tokens, 4 windows"):
        cut_spans(DOCUMENTS, 0, 100, 4)


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ((), "at least one"),
        ((0, 64), "0 is not positive"),
        ((-5,), "-5 is not positive"),
        ((64, 64), "64 after 64 is not increasing"),
        ((128, 64), "64 after 128 is not increasing"),
        ((32, 64), "32 is too short for 32 scored tokens and 1 before them: use at least 33"),
        ((64, 1024), "1024 is longer than the model's context 512"),
    ],
)
def test_lengths_that_cannot_be_used(lengths, says):
    with pytest.raises(UserError, match=says):
        check_lengths(lengths, 512)


def test_lengths_up_to_the_context_can():
    check_lengths((33, 512), 512)
    check_lengths((64, 100000), None)


def test_spans_are_cut_in_rounds_over_the_documents():
    documents = [
        list(range(100, 110)),  # two spans of 4, two tokens over
        list(range(200, 203)),  # too short
        list(range(300, 312)),  # three
        list(range(400, 404)),  # exactly one
    ]
    starts = [100, 300, 400, 104, 304, 308]
    expected = [list(range(start, start + 4)) for start in starts]
    assert cut_spans(documents, 0, 4, 6) == expected
    assert cut_spans(documents, 0, 4, 2) == expected[:2]
    with pytest.raises(UserError, match="has 6 spans of 4 tokens, 7 windows"):
        cut_spans(documents, 0, 4, 7)
