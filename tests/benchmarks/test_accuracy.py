"""Which cells of the accuracy grid are still to be run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor", reason="runs in the quantize environment")

from accuracy import missing_cells
from accuracy_arms import Judging, read_cells


def grid(cells: Path, questions: int) -> Namespace:
    judging = Judging(cells, lengths=(128,), targets=8)
    return Namespace(
        judging=judging,
        questions=questions,
        seeds=[0],
        schemes=["w3-g32"],
        methods=["gptq-2048", "gptq-512"],
        models=["/somewhere/model"],
    )


def test_a_cell_without_questions_is_run_again_for_them_and_keeps_its_divergences(tmp_path):
    cells = tmp_path / "cells.jsonl"
    cell = {"model": "model", "scheme": "w3-g32", "method": "gptq-2048", "seed": 0}
    cells.write_text(json.dumps({**cell, "kl": 0.5, "tasks": {}}) + "\n")
    assert [x["method"] for x in missing_cells(grid(cells, 0))] == ["gptq-512"]
    assert [x["method"] for x in missing_cells(grid(cells, 150))] == ["gptq-2048", "gptq-512"]

    asked = {**cell, "kl": 0.4, "tasks": {"piqa": {}}, "base_tasks": {"piqa": {}}}
    with cells.open("a") as file:
        file.write(json.dumps(asked) + "\n")
    assert [x["method"] for x in missing_cells(grid(cells, 150))] == ["gptq-512"]
    assert read_cells(grid(cells, 0).judging) == [{**asked, "kl": 0.5}]
