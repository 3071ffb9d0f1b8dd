import json
from importlib.util import find_spec

import pytest
from lm_eval_tasks import CHOICE, GENERATE, write_task
from maca_serve.common.errors import UserError
from maca_serve.engine.engine import Engine
from maca_serve.engine.fit import Fit
from maca_serve.evaluation import harness
from maca_serve.evaluation.harness import USUAL_TASKS, open_harness, read_task
from maca_serve.formats.checkpoint import open_checkpoint

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is an optional part of the serve side"
)


def test_metrics_of_a_task():
    results = {
        "results": {
            "arc_easy": {
                "alias": "arc_easy",
                "acc_norm,none": 0.5,
                "acc,none": 0.6,
                "acc_stderr,none": 0.02,
            },
            "gsm8k": {
                "exact_match,strict": 0.1,
                "exact_match_stderr,strict": "N/A",
                "exact_match,flexible": 0.3,
            },
        },
        "higher_is_better": {"arc_easy": {"acc": True}, "gsm8k": {"exact_match": False}},
        "n-samples": {"arc_easy": {"original": 2376, "effective": 2}},
        "samples": {
            "arc_easy": [
                {"doc_id": 1, "filter": "none", "acc": 1.0},
                {"doc_id": 0, "filter": "none", "acc": 0.2},
                {"doc_id": 0, "filter": "other", "acc": 0.7},
            ],
            # Not the mean of its questions, and so not to be drawn by question.
            "gsm8k": [{"doc_id": 0, "filter": "strict", "exact_match": 0.4}],
        },
    }
    assert read_task(results, "arc_easy") == {
        "acc_norm": 0.5,
        "acc": 0.6,
        "acc_stderr": 0.02,
        "metric": "acc",
        "higher_is_better": True,
        "questions": 2,
        "scores": [0.2, 1.0],
    }
    gsm8k = read_task(results, "gsm8k")
    assert (gsm8k["metric"], gsm8k["exact_match"]) == ("exact_match", 0.1)
    assert gsm8k["higher_is_better"] is False
    assert "scores" not in gsm8k


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'arc_easy' is neither a file.*pip install 'lm_eval"):
        open_harness(["arc_easy"])


@needs_lm_eval
def test_names_and_data():
    with pytest.raises(UserError, match="'no_such_task' is neither a file, nor `continuation`"):
        open_harness(["no_such_task"])
    manager = harness._task_manager()
    for name in USUAL_TASKS:
        assert name in manager.all_subtasks
        with pytest.raises(UserError, match=f"task '{name}' cannot be loaded.*HF_HUB_OFFLINE.*JSO"):
            open_harness([name])
    assert "longbench" in manager.all_groups


@pytest.fixture
def manager(tmp_path):
    """lm-eval's manager of two tasks: multiple choice, and LongBench-style generation."""
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"w{i} w{i + 1}", "choices": ["w3", "w4 w5"], "answer": i % 2}
        for i in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The fake engine's text is the last two tokens of the prompt: w5 is token 7.
    rows = [{"question": "w5 w6 " * i, "answer": "w7 w8"} for i in (1, 2, 400)]
    rows[1]["answer"] = "w1"
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    bare = {"doc_to_text": "{{question}}"}
    write_task(tasks, "choice", data, "acc", CHOICE | bare)
    write_task(tasks, "long", long, "exact_match", GENERATE)
    (tasks / "both.yaml").write_text("group: both\ntask: [choice, long]\n")
    return TaskManager(include_path=str(tasks), include_defaults=False)


@needs_lm_eval
def test_through_the_server(fake_vllm, quantized, manager, monkeypatch, proxy):
    monkeypatch.setattr(harness, "_task_manager", lambda: manager)
    opened = open_harness(["both"])
    assert opened.names == ["choice", "long"]
    with Engine(open_checkpoint(quantized), Fit(["--max-model-len", "512"], {})) as engine:
        found = opened.score(
            engine.checkpoint, engine.client(), engine.url, limit=4, seed=0, special_tokens=True
        )
        requests = [json.loads(line[8:]) for line in engine.log_lines if line.startswith("request")]
    choice, long = found["choice"], found["long"]
    assert choice["questions"] == 4
    assert choice["scores"] == [float(best_choice(i) == i % 2) for i in range(4)]
    assert choice["acc"] == sum(choice["scores"]) / 4
    assert long["scores"] == [1.0, 0.0, 1.0]
    assert long["metric"] == "exact_match"
    # Greedy, the tokenizer's own token in front, and cut on the left where the engine ends.
    generated = [request for request in requests if not request.get("echo")]
    assert {request["temperature"] for request in generated} == {0}
    prompts = sorted((request["prompt"][0] for request in generated), key=len)
    assert prompts[0] == [1, 7, 8]
    assert len(prompts[2]) == 512 - 1 - 5
    assert all(request["prompt"][0][0] == 1 for request in requests if request.get("echo"))


def best_choice(i):
    """By the fake engine's log-probabilities, written again in test_comparison.py."""
    context = [1, i + 2, i + 3]

    def total(choice):
        ids = [*context, *choice]
        return sum(by_hand(ids, place) for place in range(len(context), len(ids)))

    return max((0, 1), key=lambda which: total([[5], [6, 7]][which]))


def by_hand(ids, place):
    return -(1.0 + ((31 * ids[place - 1] + 7 * ids[place]) % 97) / 50.0 + 4.0 / place)
