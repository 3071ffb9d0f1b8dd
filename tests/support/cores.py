"""How many cores there are, for tests of several ranks."""

import pytest
from maca_serve.common.machine import physical_cpus

two_needed = pytest.mark.skipif(len(physical_cpus()) < 2, reason="two ranks want two cores")
