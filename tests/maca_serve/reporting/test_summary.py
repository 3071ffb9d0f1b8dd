import math

import pytest
from maca_serve.evaluation.recovery import recovery
from maca_serve.reporting.summary import RULES, headline, judge, rules
from maca_serve.speed.breakeven import break_even

SPREAD = [-0.02, -0.01, 0.0, 0.01, 0.02]


def entry(name="w4", kept=100.0, speed=(1.0, 1.0), size=25, spread=SPREAD, right=9, probe=100.0):
    loss, answer = -math.log(kept / 100), math.log(probe / 100)
    return {
        "name": name,
        "scheme": "W4A16 int, group 64, symmetric",
        "size_bytes": size,
        "perplexity": {
            "64": {"losses": [3.0 + loss + each for each in spread]},
            "256": {"losses": [2.0 + loss / 2 + each for each in spread]},
        },
        "tasks": {"a": {"acc": right / 10, "scores": [1.0] * right + [0.0] * (10 - right)}},
        "probes": {"copy": {"64": {"logprobs": [-1.0 + answer] * 5}}},
        "throughput": {
            "128": {
                level: {"rounds": [10.0 * ratio] * 2}
                for level, ratio in zip(("1", "4"), speed, strict=True)
            }
        },
    }


def verdict(**what):
    base = entry("base", size=100, spread=[0.0] * 5)
    this = entry(**what)
    this["recovery"] = recovery(base, this)
    this["break_even"] = break_even(base, this)
    return judge(base, this)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"speed": (1.83, 1.2)}, "use it"),
        ({"speed": (1.83, 1.0)}, "use it"),
        ({"speed": (1.0, 0.96)}, "use it"),
        ({"speed": (1.83, 1.2), "size": 100}, "use it"),
        ({"speed": (1.83, 0.54)}, "use it with 1 in flight"),
        ({"speed": (1.0, 0.54)}, "for memory only"),
        ({"size": 100}, "no gain"),
        ({"size": 120, "speed": (0.5, 0.5)}, "no gain"),
        ({"kept": 98.0, "speed": (2.0, 2.0)}, "use it"),
        ({"kept": 95.5, "speed": (2.0, 2.0)}, "undecided"),
        ({"kept": 94.5, "speed": (2.0, 2.0)}, "undecided"),
        ({"kept": 90.0, "speed": (2.0, 2.0)}, "not for quality"),
        ({"right": 2}, "not for quality"),
        ({"right": 8}, "use it"),
        ({"probe": 90.0}, "use it"),
    ],
)
def test_verdicts(what, says):
    assert verdict(**what)["verdict"] == says
    assert says.replace("1", "N") in RULES


def test_what_is_lost_is_named():
    found = verdict(kept=90.0, right=2, probe=90.0)
    assert found["lost"][0].startswith("perplexity at 64 tokens 90.0 % (8")
    assert found["lost"][1].startswith("tasks 22.2 % (")
    assert len(found["lost"]) == 2
    assert ". Below 95 %: perplexity at 64 tokens 90.0 % (8" in found["sentence"]
    assert found["sentence"].endswith(". Watch: copy 90.0 % (90.0 to 90.0).")


@pytest.mark.parametrize(("wider", "where"), [(1, "64"), (4, "64 and 256")])
def test_what_is_undecided_is_named(wider, where):
    found = verdict(kept=94.5, spread=[wider * each for each in SPREAD])
    assert found["verdict"] == "undecided"
    assert found["sentence"].endswith(
        f" Undecided: at {where} tokens its interval reaches below 95 %; more --windows narrow it."
    )


@pytest.mark.parametrize("kept", [80.0, 100.0])
def test_what_is_decided_is_not_undecided(kept):
    assert "Undecided" not in verdict(kept=kept)["sentence"]


def test_the_sentence_has_the_numbers():
    found = verdict(kept=80.0, speed=(1.83, 0.54), spread=[0.0] * 5)
    assert found["worst_length"] == "64"
    assert found["size_percent"] == 25.0
    assert found["speed"] == {
        "1 in flight": {
            "ratio": pytest.approx(1.83),
            "rounds": pytest.approx([1.83] * 2),
            "verdict": "faster",
        },
        "4 in flight": {
            "ratio": pytest.approx(0.54),
            "rounds": pytest.approx([0.54] * 2),
            "verdict": "slower",
        },
    }
    assert found["sentence"].startswith(
        "w4 (W4A16 int) recovers 84.7 % (84.7 to 84.7) of the base's perplexity on average over"
        " lengths, 80.0 % (80.0 to 80.0) at its worst length, 64 tokens; it takes 25 % of the"
        " base's space and is faster (1.83x) with 1 in flight, slower than the base (0.54x) with"
        " 4 in flight."
    )


def test_several_prompt_lengths_are_told_apart():
    base, this = entry("base", size=100), entry(speed=(1.83, 1.0))
    for each in (base, this):
        each["throughput"]["512"] = each["throughput"]["128"]
    this["recovery"], this["break_even"] = recovery(base, this), break_even(base, this)
    found = judge(base, this)
    assert "faster (1.83x) with 1 in flight at prompts of 128, about as fast" in found["sentence"]
    assert len(found["speed"]) == 4


def test_where_it_ran():
    results = {
        "machine": {"cpu": "Some CPU", "cores": 2, "gpus": []},
        "versions": {"vllm": "0.32.0"},
        "checkpoints": [{"name": "base", "scheme": "BF16"}],
    }
    assert headline(results) == "Against base (BF16) on Some CPU (2 cores), vLLM 0.32.0"
    results["machine"]["gpus"] = ["NVIDIA H100"]
    results["created"] = "2026-11-22T10:20:30+00:00"
    assert headline(results) == "Against base (BF16) on NVIDIA H100, vLLM 0.32.0, 2026-11-22"


def test_thresholds_are_in_the_rules():
    assert rules()["kept_percent"] == 95.0
    assert all("95 %" in rules()["verdicts"][word] for word in ("use it", "not for quality"))
