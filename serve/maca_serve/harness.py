"""lm-eval tasks by name, through the running engine (lm-eval's `local-completions`)."""

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from maca_serve.checkpoint import Checkpoint
from maca_serve.errors import RequestError, UserError

CONCURRENT_REQUESTS = 4
# lm-eval's own default; longer prompts are cut on the left.
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Harness:
    """Named lm-eval tasks whose data are at hand.

    Attributes:
        names: the tasks.
        manager: lm-eval's TaskManager.
    """

    names: list[str]
    manager: Any

    def score(
        self, checkpoint: Checkpoint, url: str, limit: int, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Run the tasks against a running engine.

        Args:
            checkpoint: what it serves.
            url: where, without `/v1`.
            limit: at most this many questions of each task.
            seed: of lm-eval's few-shot draws.

        Returns:
            {task: see `read_task`}.

        Raises:
            RequestError: the engine failed.
        """
        import lm_eval

        try:
            results = lm_eval.simple_evaluate(
                model="local-completions",
                model_args={
                    "model": checkpoint.name,
                    "base_url": f"{url}/v1/completions",
                    "tokenizer": str(checkpoint.path),
                    "tokenizer_backend": "huggingface",
                    "num_concurrent": CONCURRENT_REQUESTS,
                    "max_length": min(checkpoint.context or MAX_LENGTH, MAX_LENGTH),
                },
                tasks=list(self.names),
                task_manager=self.manager,
                limit=limit,
                log_samples=False,
                random_seed=seed,
                fewshot_random_seed=seed,
            )
        except Exception as error:  # lm-eval wraps failures of the server in many types
            raise RequestError(f"lm-eval failed: {_one_line(error)}") from error
        return {name: read_task(results, name) for name in self.names}


def open_harness(names: list[str]) -> Harness:
    """Look the tasks up and load their data, before any engine is started.

    Raises:
        UserError: lm-eval is not installed, does not know a name, or cannot get a task's data.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks: {names[0]!r} is neither a file nor `continuation`; to take it as an lm-eval"
            " task: pip install 'lm_eval[api]'"
        )
    manager = _task_manager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"--tasks: {name!r} is neither a file, nor `continuation`, nor an lm-eval task"
            )
        try:
            manager.load([name])
        except Exception as error:  # hub, data set and task code fail in many ways
            raise UserError(
                f"--tasks: the data of lm-eval task {name!r} cannot be loaded: {_one_line(error)};"
                " it needs the Hugging Face hub or its local cache"
            ) from error
    return Harness(names, manager)


@cache
def _task_manager() -> Any:
    """lm-eval's index of tasks, which takes it seconds to make."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def read_task(results: dict[str, Any], name: str) -> dict[str, Any]:
    """One task of lm-eval's results.

    Its `acc,none` and `acc_stderr,none` become `acc` and `acc_stderr`; of several filters the
    first counts. The headline metric is `acc` where there is one, else the task's first.

    Returns:
        {each metric, its "_stderr", "metric": the headline's name, "higher_is_better",
        "questions"}.
    """
    metrics: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metric, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics.setdefault(metric, float(value))
    names = [metric for metric in metrics if not metric.endswith("_stderr")]
    headline = "acc" if "acc" in names else names[0]
    return {
        **metrics,
        "metric": headline,
        "higher_is_better": results["higher_is_better"].get(name, {}).get(headline, True),
        "questions": results["n-samples"].get(name, {}).get("effective"),
    }


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
