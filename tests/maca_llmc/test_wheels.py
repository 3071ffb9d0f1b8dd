"""Wheels of both distributions: they build, carry the licence, and import where nothing else is."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTED = """
import sys
sys.path[:0] = {folders}
import maca_llmc
assert maca_llmc.QuantizeOptions(lengths=[8]).lengths == [8]
try:
    maca_llmc.quantize
except ImportError as error:
    assert "make setup" in str(error)
{more}
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What each wheel holds, in a folder of its own."""
    built = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    folders = {}
    for name, source in (("maca_llmc", ROOT), ("maca_serve", ROOT / "serve")):
        out, copied = built / name, built / f"{name}-source"
        # a copy: setuptools would leave its build folder, and take what lies in one already
        shutil.copytree(source / name, copied / name)
        for file in filter(Path.is_file, source.iterdir()):
            shutil.copy(file, copied)
        subprocess.run([*command, "-q", "-w", out, copied], check=True, capture_output=True)
        (wheel,) = out.glob("*.whl")
        folders[name] = tmp_path_factory.mktemp(name)
        zipfile.ZipFile(wheel).extractall(folders[name])
    return folders


def imports(folders, more=""):
    """In a Python that has the standard library only."""
    script = IMPORTED.format(folders=[str(folder) for folder in folders], more=more)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_they_carry_the_licence_and_their_data(unpacked):
    for folder in unpacked.values():
        assert list(folder.glob("*.dist-info/**/LICENSE*"))
    assert list((unpacked["maca_llmc"] / "maca_llmc" / "assets").glob("*.jsonl"))
    assert list((unpacked["maca_serve"] / "maca_serve" / "templates").glob("*.j2"))


def test_they_import_alone(unpacked):
    imports([unpacked["maca_llmc"]])
    imports(unpacked.values(), "import maca_serve; maca_serve.UserError")
