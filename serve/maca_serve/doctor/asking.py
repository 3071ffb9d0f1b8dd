"""The question to vLLM, asked in a process of its own."""

import json
import subprocess
import sys
from typing import Any

from maca_serve.console import err
from maca_serve.enginelog import find_cause, tail
from maca_serve.errors import EngineError, UserError
from maca_serve.machine import require_vllm

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
    try:
        with err.status("asking vLLM for its kernels"):
            done = subprocess.run(
                command,
                input=json.dumps(question),
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"vLLM did not answer within {PATIENCE_SECONDS:.0f} s; is the machine overloaded?"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        cause = find_cause(lines) or f"exit code {done.returncode}"
        raise EngineError(f"vLLM could not be asked: {cause}", tail(lines, LOG_TAIL))
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
