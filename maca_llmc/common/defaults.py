"""Defaults that the commands and the Python calls share."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EVALUATION_SAMPLE = ASSETS / "evaluation.jsonl"
"""English text to evaluate on."""

MODEL = "smollm2-135m-instruct"
"""The embedded model."""

SCALES = (128, 256, 512, 1024, 2048)
"""Calibration lengths, in tokens."""

TOKENS = 65_536
"""Calibration budget, in tokens."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens of calibration sequences that go through a layer together, by kind of device."""

EVALUATION_LENGTHS = (64, 256, 1024)
"""Input lengths to evaluate at, in tokens."""

EVALUATION_WINDOWS = 16
"""Target blocks to evaluate on."""

EVALUATION_TARGETS = 32
"""Tokens of a target block."""

EVALUATION_LIMIT = 200
"""Questions of a multiple-choice task."""

CONTAINER_BITS = 4
"""Bits that 2- and 3-bit codes are stored in on request: all 4-bit kernels read them."""

CHOICES = "W2A16,W3A16,W4A16,W8A16"
"""Schemes that a budget is spent on."""
