"""The scripts of ``benchmarks/`` are no package: they are found as their own folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
