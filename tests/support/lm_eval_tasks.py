"""lm-eval tasks whose data is a file: the usual ones want a hub."""

from pathlib import Path
from typing import Any

import yaml

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
}
"""Asks what `maca_serve.evaluation.tasks` asks of the same row."""
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"temperature": 1, "do_sample": False, "max_gen_toks": 5, "until": []},
}


def write_task(folder: Path, name: str, data: Path, metric: str, fields: dict[str, Any]) -> None:
    """A task of rows of `data` (JSON lines), as a YAML file in a folder for lm-eval's index."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
