import pytest
from maca_serve.speed.breakeven import break_even, in_words, ratio, reach


def run(*rounds):
    return {"rounds": list(rounds)}


def test_a_ratio_is_taken_round_by_round():
    # The machine was half as fast in the second round; the ratio was not.
    found = ratio(run(10.0, 5.0), run(18.0, 9.0))
    assert found == {"ratio": 1.8, "rounds": [1.8, 1.8], "verdict": "faster"}


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ((10.4, 10.4), "about as fast"),
        ((10.6, 10.6), "faster"),
        ((10.9, 9.3), "about as fast"),
        ((12.0, 9.9), "not clearly faster or slower"),  # one round says otherwise
        ((9.4, 9.4), "slower"),
        ((8.0, 10.1), "not clearly faster or slower"),
        ((5.0, 15.0), "not clearly faster or slower"),
    ],
)
def test_noise_is_no_difference(rounds, verdict):
    assert ratio(run(10.0, 10.0), run(*rounds))["verdict"] == verdict


def speeds(table):
    return {
        "name": "x",
        "throughput": {
            length: {level: run(speed, speed) for level, speed in row.items()}
            for length, row in table.items()
        },
    }


def test_where_it_stops_being_faster():
    base = speeds(
        {"32": {"1": 10.0, "4": 40.0, "16": 100.0}, "512": {"1": 5.0, "4": 9.0, "16": 9.0}}
    )
    low = speeds({"32": {"1": 18.0, "4": 44.0, "16": 90.0}, "512": {"1": 6.0, "4": 9.0, "16": 9.9}})
    found = break_even(base, low)
    assert found["against"] == "x"
    assert found["ratios"]["32"]["4"]["ratio"] == pytest.approx(1.1)
    assert found["by_length"] == {
        "32": {"faster_at": [1, 4], "stops_at": 16},
        "512": {"faster_at": [1, 16], "stops_at": None},
    }
    assert found["by_level"] == {
        "1": {"faster_at": [32, 512], "stops_at": None},
        "4": {"faster_at": [32], "stops_at": 512},
        "16": {"faster_at": [512], "stops_at": None},
    }


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ("fff", "at all measured"),
        ("sss", "nowhere"),
        ("ffs", "up to 4, no longer at 16"),
        ("sff", "at 4, 16 only"),
        ("fsf", "at 1, 16 only"),
        ("sfs", "at 4 only"),
    ],
)
def test_in_words(verdicts, words):
    names = {"f": "faster", "s": "slower"}
    ratios = {n: {"verdict": names[v]} for n, v in zip(("1", "4", "16"), verdicts, strict=True)}
    assert in_words(reach(ratios), [1, 4, 16]) == words
