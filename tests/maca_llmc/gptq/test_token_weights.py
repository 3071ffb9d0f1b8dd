import pytest

from maca_llmc.gptq.token_weights import sequence_segments, total_weight


def brute_force(length, exponent, scales, reference):
    """The definition, token by token: t counts once in each prefix that holds it."""
    prefixes = {scale for scale in scales or () if scale < length} | {length}
    return [
        sum((prefix / reference) ** -exponent for prefix in prefixes if prefix >= t)
        for t in range(1, length + 1)
    ]


@pytest.mark.parametrize("first", [1.0, 0.25, 16.0])
@pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scales", [None, [1], [4, 8, 32], [7], [100]])
@pytest.mark.parametrize("length", [1, 7, 8, 33])
def test_segments_are_the_definition(length, exponent, scales, first):
    segments = sequence_segments(length, exponent, scales, reference=16, first=first)
    assert [segment.start for segment in segments] == [0] + [s.stop for s in segments[:-1]]
    weights = [s.weight for s in segments for _ in range(s.start, s.stop)]
    expected = brute_force(length, exponent, scales, 16)
    expected[0] *= first
    assert weights == pytest.approx(expected, rel=1e-12)
    assert total_weight(segments) == (pytest.approx(sum(expected)), length)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("length", [3, 511, 4097])
def test_the_reference_length_weighs_exactly_one(length, exponent):
    assert [s.weight for s in sequence_segments(length, exponent, None, length)] == [1.0]


def test_each_sequence_weighs_the_same_under_maca():
    totals = [total_weight(sequence_segments(n, 1.0, None, 10))[0] for n in (1, 10, 1000)]
    assert totals == pytest.approx([10.0] * 3)


@pytest.mark.parametrize(("length", "reference"), [(0, 1), (1, 0)])
def test_lengths_must_be_positive(length, reference):
    with pytest.raises(ValueError, match="positive"):
        sequence_segments(length, 1.0, None, reference)
