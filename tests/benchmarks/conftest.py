"""The scripts of ``benchmarks/`` are no package: they are found as their own folder.

Those that quantize run in the quantize environment and those that draw in the serve environment;
what is tested here is collected in both, and skips where its packages are not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
