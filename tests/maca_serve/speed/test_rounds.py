from types import SimpleNamespace

import pytest
from maca_serve import throughput
from maca_serve.measuring.settings import SpeedSettings
from maca_serve.speed import alternation
from maca_serve.speed.rounds import Timing


class Recorder:
    """Stands in for the benchmark: notes what was run, answers with a number per run."""

    def __init__(self, settings):
        self.settings = settings
        self.runs = []

    def run(self, engine, load):
        self.runs.append((engine.checkpoint.name, load.input_len, load.level))
        speed = float(len(self.runs))
        return {
            "output_tokens_per_s": speed,
            "requests_per_s": 2.0 * speed,
            "requests": 4,
            "duration_s": 1.0,
        }


def engines(names):
    return [SimpleNamespace(checkpoint=SimpleNamespace(name=name)) for name in names]


def test_every_load_alternates():
    recorder = Recorder(SpeedSettings(concurrency=(1, 4), input_len=(32,)))
    timing = Timing(recorder, "a")
    timing.run(engines("ab"), (0, 1))
    assert recorder.runs == [(name, 32, level) for level in "14" for name in "abba"]
    assert timing.results("a")["throughput"]["32"]["1"]["rounds"] == [1.0, 4.0]
    assert timing.results("b")["throughput"]["32"]["4"]["rounds"] == [6.0, 7.0]
    assert "rates" not in timing.results("a")
    assert timing.seconds("a") >= 0.0


def test_rates_are_shares_of_the_first_ones_peak_and_stay():
    recorder = Recorder(SpeedSettings(concurrency=(1, 4), input_len=(32, 64), rates="auto"))
    timing = Timing(recorder, "a")
    for name, number in (("a", 0), ("b", 0), ("b", 1), ("a", 1)):
        timing.run(engines(name), (number,))
    # Its second run of 32 tokens in reached 4 requests per second, of 64 tokens in 8.
    for name in "ab":
        rates = timing.results(name)["rates"]
        assert list(rates["32"]) == ["1", "2", "3", "4"]
        assert list(rates["64"]) == ["2", "4", "6", "8"]
        assert all(len(run["rounds"]) == 2 for runs in rates.values() for run in runs.values())


@pytest.mark.parametrize("free", [0, 10**12])
def test_engines_together_and_in_blocks(fake_vllm, base, quantized, monkeypatch, free):
    monkeypatch.setattr(alternation, "available_memory", lambda: free)
    results = throughput([base, quantized], concurrency=[1], input_len=[32, 64], rates=[0.5, 2])
    assert results["schedule"]["starts"] == (2 if free else 3)
    assert results["settings"]["speed"]["rates"] == [0.5, 2.0]
    for entry in results["checkpoints"]:
        assert list(entry["rates"]["64"]) == ["0.5", "2"]
        assert entry["throughput"]["32"]["1"]["rounds"] == [10.0, 10.0]
        assert entry["seconds"]["start"] > 0
