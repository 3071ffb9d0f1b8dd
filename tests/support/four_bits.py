"""What vLLM can run on this CPU, for the tests with the real engine."""

import pytest
from maca_serve.engine.fit import cpu_dtype

RUN = cpu_dtype() == "bfloat16"
"""vLLM's CPU build has 4-bit kernels for AVX-512 only."""

needed = pytest.mark.skipif(not RUN, reason="vLLM has no 4-bit kernel for a CPU without AVX-512")
LOW_BIT = "w4a16" if RUN else "w8a8"
"""A checkpoint that the engine runs here."""
