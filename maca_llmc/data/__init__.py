"""Calibration data: from raw text or chats to an ordered loader of windows of chosen lengths."""

from maca_llmc.data.calibration import (
    CalibrationSet,
    build_calibration_set,
)
from maca_llmc.data.rows import Document
from maca_llmc.data.sources import (
    CALIBRATION_SAMPLE,
    describe_source,
    read_documents,
)

__all__ = [
    "CALIBRATION_SAMPLE",
    "CalibrationSet",
    "Document",
    "build_calibration_set",
    "describe_source",
    "read_documents",
]
