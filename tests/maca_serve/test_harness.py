import pytest
from maca_serve import harness
from maca_serve.errors import UserError
from maca_serve.harness import open_harness, read_task


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
        "n-samples": {"arc_easy": {"original": 2376, "effective": 40}},
    }
    assert read_task(results, "arc_easy") == {
        "acc_norm": 0.5,
        "acc": 0.6,
        "acc_stderr": 0.02,
        "metric": "acc",
        "higher_is_better": True,
        "questions": 40,
    }
    gsm8k = read_task(results, "gsm8k")
    assert (gsm8k["metric"], gsm8k["exact_match"]) == ("exact_match", 0.1)
    assert gsm8k["higher_is_better"] is False


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'arc_easy' is neither a file.*pip install 'lm_eval"):
        open_harness(["arc_easy"])


def test_with_lm_eval():
    pytest.importorskip("lm_eval", reason="lm-eval is an optional part of the serve side")
    with pytest.raises(UserError, match="'no_such_task' is neither a file, nor `continuation`"):
        open_harness(["no_such_task"])
    with pytest.raises(UserError, match="data of lm-eval task 'arc_easy' cannot be loaded"):
        open_harness(["arc_easy"])
