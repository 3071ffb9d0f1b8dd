"""What the serve side imports of this package: it has neither llm-compressor nor the rest."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SERVE = Path(__file__).parents[2] / "serve" / "maca_serve"
IMPORT = re.compile(r"^\s*(?:from|import) (maca_llmc[\w.]*)(?: import (\w+))?", re.M)

CHECK = """
import importlib, sys
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


def test_importing_the_package_does_not_wait_for_torch():
    script = (
        "import sys, maca_llmc; maca_llmc.QuantizeOptions(lengths=[8])\n"
        "print(*{'torch', 'llmcompressor', 'typer'}.intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


@pytest.mark.parametrize(
    "imported",
    ["from maca_llmc import build_calibration_set", "import llmcompressor, maca_llmc"],
)
def test_the_first_name_that_is_used_registers_what_recipes_and_oneshot_name(imported):
    script = (
        f"{imported}\n"
        "from compressed_tensors.utils.impl_backend import ImplBackend\n"
        "from llmcompressor.modifiers import ModifierFactory\n"
        "from llmcompressor.pipelines.registry import CalibrationPipeline\n"
        "fields = {'scheme': 'W4A16', 'allow_registered': True, 'allow_experimental': False}\n"
        "print(type(ModifierFactory.create('MaCaModifier', **fields)).__module__)\n"
        "print(CalibrationPipeline.get_value_from_registry('maca').__module__)\n"
        "print('maca_llmc.gptq.cpu_backend' in __import__('sys').modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    names = ["maca_llmc.modifier", "maca_llmc.calibrate.pipeline", "True"]
    assert done.stdout.split()[-3:] == names, done.stderr
