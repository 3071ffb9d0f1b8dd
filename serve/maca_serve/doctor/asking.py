"""The question to vLLM, asked in a process of its own."""

import json
import subprocess
import sys
from typing import Any

from maca_serve.common.console import err
from maca_serve.common.errors import EngineError, UserError
from maca_serve.common.machine import require_vllm
from maca_serve.engine.enginelog import find_cause, tail
from maca_serve.engine.process import start_group, stop_group

LOG_TAIL = 15
# vLLM's imports take some 20 s on two cores; a question itself takes seconds.
PATIENCE_SECONDS = 600.0


def ask(question: dict[str, Any]) -> dict[str, Any]:
    """Ask vLLM which kernels it would choose.

    Args:
        question: see `maca_serve.doctor.worker`, which also describes the answers.

    Raises:
        UserError: vLLM is not installed here, or does not answer.
        EngineError: it died over the question, with the last lines that it printed.
    """
    require_vllm()
    command = [sys.executable, "-m", "maca_serve.doctor.worker"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # It forks for every card that is asked about; all of them end with it.
    process = start_group(command, {}, **pipes)
    try:
        with err.status("asking vLLM for its kernels"):
            out, errors = process.communicate(json.dumps(question), timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"vLLM did not answer within {PATIENCE_SECONDS:.0f} s; is the machine overloaded?"
        ) from None
    finally:
        stop_group(process)
    if process.returncode != 0:
        lines = errors.splitlines()
        cause = find_cause(lines) or f"exit code {process.returncode}"
        raise EngineError(f"vLLM could not be asked: {cause}", tail(lines, LOG_TAIL))
    answer: dict[str, Any] = json.loads(out)
    return answer
