"""What the arms of the accuracy grid stand for."""

import pytest
from accuracy_arms import METHODS, MIXED, TOKENS

from maca_llmc.data.windows import window_counts
from maca_llmc.gptq.token_weights import sequence_segments


def test_the_arm_of_gptqmodel_weighs_lengths_as_its_buckets_do():
    """GPTQModel (main) divides a sequence's ``X^T X`` by its length times ``(B n_b / n)^0.2``.

    ``n_b`` of the n sequences are in its one of B buckets; here each length is a bucket.
    """
    fields, data = METHODS["mixed-p0.8"]
    assert data["scales"] == MIXED
    counts = window_counts(MIXED, TOKENS, "tokens")
    total = sum(counts.values())
    for length, count in counts.items():
        theirs = 1 / (length * (len(MIXED) * count / total) ** 0.2)
        (ours,) = sequence_segments(length, fields["length_exponent"], None, reference=128)
        (shortest,) = sequence_segments(128, fields["length_exponent"], None, reference=128)
        of_shortest = 1 / (128 * (len(MIXED) * counts[128] / total) ** 0.2)
        # whole windows share the tokens no better than that
        assert ours.weight / shortest.weight == pytest.approx(theirs / of_shortest, rel=0.06)
