"""What the shipped sample promises to those who use it by default."""

import json
import re

import pytest

from maca_llmc.common.defaults import EVALUATION_SAMPLE
from maca_llmc.data import CALIBRATION_SAMPLE, read_documents


@pytest.mark.parametrize("path", [CALIBRATION_SAMPLE, EVALUATION_SAMPLE])
def test_rows(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert set(row) == {"text", "source"}
        assert row["text"].strip() == row["text"] and len(row["text"]) >= 300
        assert not re.search(
            r"gutenberg|transcriber|etext|[\r\t\u2500-\u257f]|\n{3}", row["text"], re.I
        )
    assert len({row["text"] for row in rows}) == len(rows)


def test_long_documents():
    lengths = [len(text) for text in read_documents(CALIBRATION_SAMPLE)]
    assert sum(length >= 9_000 for length in lengths) >= 40
    assert sum(300 <= length <= 2_000 for length in lengths) >= 40
    assert sum(length >= 38_000 for length in map(len, read_documents(EVALUATION_SAMPLE))) >= 3


def test_no_text_in_both():
    def runs(path):
        words = [re.findall(r"\w+", text.lower()) for text in read_documents(path)]
        return {tuple(text[i : i + 20]) for text in words for i in range(len(text) - 19)}

    assert not runs(CALIBRATION_SAMPLE) & runs(EVALUATION_SAMPLE)
