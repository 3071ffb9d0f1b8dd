"""Latency and throughput of a running engine, by vLLM's own `vllm bench serve`."""

import json
import select
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, Self

from maca_serve.common.errors import RequestError
from maca_serve.engine.client import NO_PROXIES
from maca_serve.engine.engine import Engine
from maca_serve.engine.process import start_group, stop_group
from maca_serve.measuring.settings import SpeedSettings
from maca_serve.speed.loads import Load

METRICS = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "p50", "p90", "p99")


class Benchmark:
    """The process that runs `vllm bench serve`, as a context manager.

    It imports vLLM in the background from the moment of entering, so enter it before the engine
    starts and use it for every engine.
    """

    def __init__(self, settings: SpeedSettings) -> None:
        """Prepare; nothing runs yet."""
        self.settings = settings
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start the process."""
        self._folder = tempfile.TemporaryDirectory(prefix="maca-serve-bench-")
        with self._log.open("w") as log:
            self._process = start_group(
                [sys.executable, "-m", "maca_serve.speed.bench_worker"],
                {"HF_HUB_OFFLINE": "1", **NO_PROXIES},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process and remove its files."""
        assert self._process is not None
        stop_group(self._process)
        self._folder.cleanup()

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "bench.log"

    def run(self, engine: Engine, load: Load) -> dict[str, Any]:
        """One run under one load, after a warm-up of as many requests as are to be in flight.

        Args:
            engine: running.
            load: what it is given.

        Returns:
            See `read_result`.

        Raises:
            EngineError: the engine died meanwhile.
            RequestError: the benchmark failed, or some of its requests did.
        """
        result = Path(self._folder.name) / "result.json"
        self._send(self._arguments(engine, load, result))
        answer = self._receive(engine)
        if "error" in answer:
            raise RequestError(f"vllm bench serve failed: {answer['error']}")
        measured = json.loads(result.read_text())
        if measured["failed"] or not measured["completed"]:
            raise RequestError(
                f"vllm bench serve: {measured['failed']} of {measured['num_prompts']} requests"
                f" failed ({load})"
            )
        return read_result(measured)

    def _arguments(self, engine: Engine, load: Load, result: Path) -> list[str]:
        limit = {"--max-concurrency": load.concurrency, "--request-rate": load.rate}
        options = {
            **{option: value for option, value in limit.items() if value is not None},
            "--backend": "vllm",
            "--base-url": engine.url,
            "--model": engine.checkpoint.name,
            "--tokenizer": engine.checkpoint.path,
            "--dataset-name": "random",
            "--random-input-len": load.input_len,
            "--random-output-len": self.settings.output_len,
            "--num-prompts": self.settings.prompts_under(load),
            "--num-warmups": load.concurrency or 1,
            "--seed": self.settings.seed,
            "--temperature": 0,
            "--percentile-metrics": ",".join(METRICS),
            "--metric-percentiles": "50,90,99",
            "--result-dir": result.parent,
            "--result-filename": result.name,
        }
        flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
        return [str(part) for option in options.items() for part in option] + flags

    def _send(self, arguments: list[str]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _receive(self, engine: Engine) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        while not _readable(self._process.stdout):
            engine.check()
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self) -> RequestError:
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        return RequestError(f"vllm bench serve ended: {lines[-1] if lines else 'it said nothing'}")


def read_result(measured: dict[str, Any]) -> dict[str, Any]:
    """What results keep of the file that `vllm bench serve --save-result` writes.

    Returns:
        {"ttft_ms", "tpot_ms", "itl_ms", "e2el_ms": {"mean", "median", "p50", "p90", "p99"},
        "output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "requests", "duration_s"}.
    """
    latencies = {
        f"{metric}_ms": {name: measured[f"{name}_{metric}_ms"] for name in STATISTICS}
        for metric in METRICS
    }
    return {
        **latencies,
        "output_tokens_per_s": measured["output_throughput"],
        "total_tokens_per_s": measured["total_token_throughput"],
        "requests_per_s": measured["request_throughput"],
        "requests": measured["completed"],
        "duration_s": measured["duration"],
    }


def combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one checkpoint under one load as one: of every number the median over the runs.

    Requests and seconds are sums, and `rounds` are the runs' output tokens per second.
    """
    combined = _medians(runs)
    for total in ("requests", "duration_s"):
        combined[total] = sum(run[total] for run in runs)
    return {**combined, "rounds": [run["output_tokens_per_s"] for run in runs]}


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _medians([run[key] for run in runs])
        if isinstance(value, dict)
        else statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
    }


def _readable(stream: IO[str]) -> bool:
    """Whether a line, or the end, is there within a second; one line answers one request."""
    return bool(select.select([stream], [], [], 1.0)[0])
