"""What the serve side imports of this package: it has neither llm-compressor nor the rest."""

import re
import subprocess
import sys
from pathlib import Path

SERVE = Path(__file__).parents[2] / "serve" / "maca_serve"
IMPORT = re.compile(r"^\s*(?:from|import) (maca_llmc[\w.]*)(?: import (\w+))?", re.M)

CHECK = """
import sys
sys.argv[0] = "maca-llmc"  # as where llm-compressor is missing: nothing is imported early
import importlib
for name in {names}:
    importlib.import_module(name)
heavy = {{"llmcompressor", "datasets", "numba", "loguru"}}
print(*sorted(heavy.intersection(sys.modules)))
"""


def shared_modules():
    found = set()
    for file in SERVE.rglob("*.py"):
        for module, name in IMPORT.findall(file.read_text()):
            parts = Path(module.replace(".", "/"))
            found.add(f"{module}.{name}" if (SERVE.parents[1] / parts).is_dir() else module)
    return sorted(found)


def test_no_import_of_the_serve_side_reaches_llm_compressor():
    names = shared_modules()
    assert "maca_llmc.common.files" in names and "maca_llmc.evaluation.questions" in names
    script = CHECK.format(names=names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")
