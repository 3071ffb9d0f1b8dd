import pytest
from maca_serve.evaluation.windows import resolve_lengths

from maca_llmc.common.errors import UserError


def test_the_word_for_the_context():
    assert resolve_lengths((64, "context"), 512) == (64, 512)
    assert resolve_lengths((64, 256), None) == (64, 256)


@pytest.mark.parametrize(
    ("lengths", "context", "says"),
    [
        (("context",), None, "says no context"),
        ((64, "all"), 512, "'all' is neither"),
        (("context", 512), 512, "512 after 512"),
    ],
)
def test_words_that_are_no_length(lengths, context, says):
    with pytest.raises(UserError, match=says):
        resolve_lengths(lengths, context)
