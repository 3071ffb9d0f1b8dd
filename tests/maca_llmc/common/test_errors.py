"""What errors of others say, in one line."""

import pytest

from maca_llmc.common.errors import first_line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("\n  one \ntwo", "one"),
        ("these fields are wrong:\n  - size\n  - width", "these fields are wrong: - size"),
        ("", "KeyError"),
    ],
)
def test_the_first_line_that_says_something(said, expected):
    assert first_line(KeyError() if not said else ValueError(said)) == expected
