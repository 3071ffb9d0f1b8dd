"""Every command and example of docs/serving.md."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from maca_serve.cli import app
from maca_serve.engine.extra_flags import check_flags

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
COMMANDS = typer.main.get_command(app).commands


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def lines(program):
    """Its commands: lines of shell blocks, in-line code, and what systemd starts."""
    starts = [line for block in blocks("bash") for line in block.splitlines()]
    starts += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    starts += re.findall(r"^ExecStart=\S*/(maca-serve .*)", TEXT, re.MULTILINE)
    wanted = [line.partition(" #")[0] for line in starts if line.startswith(f"{program} ")]
    return [line for line in wanted if "DIR" in line or "/srv" in line]


@pytest.mark.parametrize("line", lines("maca-serve"))
def test_options_of_ours(line):
    _, name, *words = shlex.split(line)
    parsed = COMMANDS[name].make_context(name, words).params
    check_flags(parsed.get("vllm_flags") or [])


def test_there_are_such_lines():
    assert len(lines("maca-serve")) >= 8 and len(lines("vllm serve")) == 1


def flags_of_vllm():
    """Of `vllm serve`: of its own line, and behind `--` of ours."""
    found = [shlex.split(line)[2:] for line in lines("vllm serve")]
    found += [
        shlex.split(line.partition(" -- ")[2]) for line in lines("maca-serve") if " -- " in line
    ]
    found += [shlex.split(flags) for flags in re.findall(r"`-- ([^`]+)`", TEXT)]
    found += [shlex.split(command) for command in re.findall(r"command: (.+)", TEXT)]
    return found


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_options_of_vllm():
    code = "import sys, json; from vllm.entrypoints.launchers.cli_args import make_arg_parser; "
    code += "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; "
    code += "[make_arg_parser(P()).parse_args(words) for words in json.loads(sys.argv[1])]"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(flags_of_vllm())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_one(tmp_path):
    (unit,) = blocks("ini")
    program = re.search(r"ExecStart=(\S+)", unit)[1]
    path = tmp_path / "maca-serve.service"
    path.write_text(unit.replace(program, sys.executable).replace("User=maca\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if path.name in line]
    assert done.returncode == 0 and not ours, done.stderr


def test_the_compose_file_is_yaml():
    yaml = pytest.importorskip("yaml")
    (service,) = yaml.safe_load(blocks("yaml")[-1])["services"].values()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
