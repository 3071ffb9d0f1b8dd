"""lm-eval tasks by name, through the running engine (lm-eval's `local-completions`).

Multiple choice by log-probability, and tasks whose answers are generated (LongBench): greedily.
Every prompt goes as token ids, with the special tokens that the tokenizer puts before a text, and
without a chat template. Prompts longer than the engine takes are cut on the left.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from maca_llmc.common.errors import first_line
from maca_serve.common.errors import RequestError, UserError
from maca_serve.engine.client import TIMEOUT_SECONDS, Client, direct_to
from maca_serve.formats.checkpoint import Checkpoint

CONCURRENT_REQUESTS = 4
# What most papers on quantization report, under one name.
USUAL = "usual"
USUAL_TASKS = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "social_iqa",
    "winogrande",
)


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
        self,
        checkpoint: Checkpoint,
        client: Client,
        url: str,
        *,
        limit: int,
        seed: int,
        special_tokens: bool,
    ) -> dict[str, dict[str, Any]]:
        """Run the tasks against a running engine.

        Args:
            checkpoint: what it serves.
            client: of the engine.
            url: where it is, without `/v1`.
            limit: at most this many questions of each task, its first ones.
            seed: of lm-eval's few-shot draws.
            special_tokens: whether prompts begin with the tokenizer's own.

        Returns:
            {task: see `read_task`}.

        Raises:
            RequestError: the engine failed.
        """
        import lm_eval

        try:
            with direct_to(url):
                results = lm_eval.simple_evaluate(
                    model="local-completions",
                    model_args={
                        "model": checkpoint.name,
                        "base_url": f"{url}/v1/completions",
                        "tokenizer": str(checkpoint.path),
                        "tokenizer_backend": "huggingface",
                        "add_bos_token": special_tokens,
                        "num_concurrent": CONCURRENT_REQUESTS,
                        "max_length": client.max_length(),
                        "timeout": int(TIMEOUT_SECONDS),
                        "max_retries": 1,  # a local engine that failed once is dying
                    },
                    tasks=list(self.names),
                    task_manager=self.manager,
                    limit=limit,
                    # LongBench's settings say 1 and rely on a switch that completions do not have.
                    gen_kwargs={"temperature": 0},
                    random_seed=seed,
                    fewshot_random_seed=seed,
                )
        except Exception as error:  # lm-eval wraps failures of the server in many types
            raise RequestError(f"lm-eval failed: {first_line(error)}") from error
        return {name: read_task(results, name) for name in self.names}


def open_harness(names: list[str]) -> Harness:
    """Look the tasks up and load their data, before any engine is started.

    Args:
        names: of tasks, tags or groups; the latter two stand for their tasks.

    Raises:
        UserError: lm-eval is not installed, does not know a name, or cannot get a task's data.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks: {names[0]!r} is neither a file nor one of ours; to take it as an lm-eval"
            " task: pip install 'lm_eval[api]'"
        )
    manager = _task_manager()
    found: dict[str, None] = {}
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"--tasks: {name!r} is neither a file, nor `continuation`, `needle`, `copy` or"
                f" `{USUAL}`, nor an lm-eval task"
            )
        found |= dict.fromkeys(_load(manager, name))
    return Harness(list(found), manager)


def _load(manager: Any, name: str) -> list[str]:
    """The tasks that a name stands for, with their data at hand."""
    try:
        return list(manager.load([name])["tasks"])
    except ImportError as error:
        raise UserError(f"--tasks: lm-eval task {name!r}: {first_line(error)}") from error
    except Exception as error:  # hub, data set and task code fail in many ways
        raise UserError(
            f"--tasks: the data of lm-eval task {name!r} cannot be loaded: {first_line(error)};"
            " let it reach the Hugging Face hub once (HF_HUB_OFFLINE unset), or give a JSONL file"
            " of `question`, `choices`, `answer`"
        ) from error


@cache
def _task_manager() -> Any:
    """lm-eval's index of tasks, which takes it seconds to make."""
    from lm_eval.tasks import TaskManager

    # Failures come back as an exception, and are told in one line.
    for name in ("lm_eval", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return TaskManager()


def read_task(results: dict[str, Any], name: str) -> dict[str, Any]:
    """One task of lm-eval's results.

    Its `acc,none` and `acc_stderr,none` become `acc` and `acc_stderr`; of several filters the
    first counts. The headline metric is `acc` where there is one, else the task's first.

    Returns:
        {each metric, its "_stderr", "metric": the headline's name, "higher_is_better",
        "questions", and "scores", the headline metric of each question, where it is their mean}.
    """
    metrics: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metric, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics.setdefault(metric, float(value))
    names = [metric for metric in metrics if not metric.endswith("_stderr")]
    headline = "acc" if "acc" in names else names[0]
    scores = _scores(results.get("samples", {}).get(name, []), headline)
    return {
        **metrics,
        "metric": headline,
        "higher_is_better": results["higher_is_better"].get(name, {}).get(headline, True),
        "questions": results["n-samples"].get(name, {}).get("effective"),
        **({"scores": scores} if scores and _is_mean(scores, metrics[headline]) else {}),
    }


def _scores(samples: list[dict[str, Any]], metric: str) -> list[float]:
    """The metric of each question by the first filter, none where it is not one number each."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    values = [sample.get(metric) for sample in sorted(first, key=lambda sample: sample["doc_id"])]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else []


def _is_mean(scores: list[float], value: float) -> bool:
    # Metrics over all questions at once (F1, perplexity) cannot be drawn question by question.
    return math.isclose(math.fsum(scores) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9)
