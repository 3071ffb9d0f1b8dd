import math

import numpy as np
import pytest
from maca_serve.evaluation import recovery as module
from maca_serve.evaluation.recovery import recovery


def entry(losses, scores=(), logprobs=(), **task):
    return {
        "perplexity": {length: {"losses": list(values)} for length, values in losses.items()},
        "tasks": {"a": {"acc": float(np.mean(scores)), "scores": list(scores), **task}}
        if len(scores)
        else {},
        "probes": {"copy": {"64": {"logprobs": list(logprobs)}}} if len(logprobs) else {},
    }


@pytest.fixture
def draw():
    return np.random.default_rng(7)


def test_percents():
    def with_tasks(losses, acc, lower):
        tasks = {
            "a": {"acc": acc},
            "zero": {"acc": 0.0},
            "b": {"metric": "bits", "bits": lower, "higher_is_better": False},
        }
        return {**entry({"64": losses, "256": losses}), "tasks": tasks}

    worse = [1.0 + math.log(1.25), 2.0 + math.log(1.25)]
    found = recovery(with_tasks([1.0, 2.0], 0.5, 1.0), with_tasks(worse, 0.4, 2.0))
    assert found["perplexity"] == pytest.approx({"64": 80.0, "256": 80.0, "mean": 80.0})
    assert found["tasks"] == {"a": 80.0, "zero": None, "b": 50.0, "mean": 65.0}
    # None of these tasks has a score for each question.
    assert found["intervals"]["tasks"] == dict.fromkeys(["a", "zero", "b", "mean"])


def test_what_all_windows_lose_alike_has_no_interval(draw):
    hard = draw.normal(3.0, 1.0, 12)
    found = recovery(entry({"64": hard}), entry({"64": hard + math.log(1.25)}))
    assert found["intervals"]["perplexity"]["64"] == pytest.approx([80.0, 80.0])


def test_against_a_bootstrap_by_hand(draw):
    base = {"64": draw.normal(3, 1, 12), "256": draw.normal(2.5, 1, 12)}
    # Windows that lose at 64 gain at 256: in the mean they would cancel, if drawn together.
    lost = draw.normal(0.05, 0.1, 12)
    this = {"64": base["64"] + lost, "256": base["256"] - lost}
    found = recovery(entry(base), entry(this))["intervals"]["perplexity"]
    picked = np.random.default_rng(1).integers(0, 12, (20000, 12))
    short, long = (100 * np.exp(sign * lost[picked].mean(axis=1)) for sign in (-1, 1))
    for name, values in {"64": short, "256": long, "mean": (short + long) / 2}.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert found[name] == pytest.approx([low, high], abs=0.06 * (high - low) + 0.02)
    assert found["mean"][1] - found["mean"][0] < 0.2 * (found["64"][1] - found["64"][0])


def test_intervals_hold_what_they_promise(draw, monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 499)
    truth = 100 * math.exp(-0.05)
    inside = 0
    for _ in range(300):
        base = draw.normal(3.0, 1.0, 40)
        this = base + draw.normal(0.05, 0.1, 40)
        low, high = recovery(entry({"64": base}), entry({"64": this}))["intervals"]["perplexity"][
            "64"
        ]
        inside += low <= truth <= high
    assert 0.9 < inside / 300 < 0.985


def test_questions_are_paired(draw):
    right = (draw.random(400) < 0.6).astype(float)
    flipped = right.copy()
    flipped[:20] = 1 - flipped[:20]
    losses = {"64": [1.0, 2.0]}
    found = recovery(entry(losses, right), entry(losses, flipped))
    low, high = found["intervals"]["tasks"]["a"]
    assert low < found["tasks"]["a"] < high
    # 20 of 400 answers changed: unpaired, two accuracies of 0.6 would give some 16 percent.
    assert high - low < 8
    assert found["intervals"]["tasks"]["mean"] == [low, high]


def test_lower_is_better_and_a_base_that_may_be_zero():
    losses, options = {"64": [1.0, 2.0]}, {"metric": "acc", "higher_is_better": False}
    found = recovery(entry(losses, [2.0] * 9, **options), entry(losses, [4.0] * 9, **options))
    assert found["intervals"]["tasks"]["a"] == [50.0, 50.0]
    found = recovery(entry(losses, [1.0, 0.0, 0.0]), entry(losses, [1.0, 0.0, 0.0]))
    assert found["tasks"]["a"] == pytest.approx(100.0)
    assert found["intervals"]["tasks"]["a"] is None


def test_probes_recover_as_perplexity_does():
    base, this = (entry({"64": [1.0, 2.0]}, logprobs=values) for values in ([-1, -2], [-2, -3]))
    found = recovery(base, this)
    assert found["probes"]["copy"]["mean"] == pytest.approx(100 / math.e)
    assert found["intervals"]["probes"]["copy"]["64"] == pytest.approx([100 / math.e] * 2)
