import pytest
from maca_serve.common.errors import EngineError, RequestError, UserError
from maca_serve.engine.engine import Engine
from maca_serve.engine.fit import Fit
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.measuring.settings import SpeedSettings
from maca_serve.speed.bench import Benchmark, combine
from maca_serve.speed.loads import Load, rates_of_peak


@pytest.fixture
def engine(fake_vllm, quantized) -> Engine:
    return Engine(open_checkpoint(quantized), Fit([], {}))


def run(engine, concurrency=1):
    with Benchmark(SpeedSettings()) as benchmark, engine:
        return benchmark.run(engine, Load(128, concurrency=concurrency))


def test_one_process_runs_every_level(engine):
    with Benchmark(SpeedSettings(prompts=6)) as benchmark, engine:
        one, four = (benchmark.run(engine, Load(128, concurrency=n)) for n in (1, 4))
        arriving = benchmark.run(engine, Load(64, rate=0.5))
    assert [run["requests"] for run in (one, four, arriving)] == [6, 6, 6]
    assert [run["output_tokens_per_s"] for run in (one, four, arriving)] == [10.0, 40.0, 10.0]
    assert one["total_tokens_per_s"] == 50.0
    assert [one[f"{m}_ms"]["p99"] for m in ("ttft", "tpot", "itl", "e2el")] == [100, 200, 300, 400]


def test_proxies_of_the_environment_are_not_measured(engine, proxy):
    assert run(engine)["requests"] == 2


def test_failures_are_named(fake_vllm, engine):
    fake_vllm("bench fails")
    with pytest.raises(RequestError, match="bench serve failed: ValueError: no such data set"):
        run(engine)


def test_dropped_requests_are_no_result(fake_vllm, engine):
    fake_vllm("bench drops")
    with pytest.raises(RequestError, match=r"1 of 8 requests failed .4 in flight"):
        run(engine, 4)


def test_engine_that_dies_meanwhile(fake_vllm, engine):
    fake_vllm("dies in bench")
    with pytest.raises(EngineError, match="died while it was used: MemoryError"):
        run(engine)


def test_worker_that_is_gone(engine):
    with engine, Benchmark(SpeedSettings()) as benchmark:
        benchmark._process.kill()
        benchmark._process.wait()
        with pytest.raises(RequestError, match="bench serve ended"):
            benchmark.run(engine, Load(128, concurrency=1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"concurrency": ()}, "positive"),
        ({"concurrency": (0, 1)}, "positive"),
        ({"concurrency": (4, 4)}, "stands twice"),
        ({"input_len": (0,)}, "--input-len: give positive numbers"),
        ({"input_len": (32, 32)}, "--input-len: a number stands twice"),
        ({"rates": (0.0, 1.0)}, "--rates: give positive numbers"),
        ({"rates": (float("inf"),)}, "--rates: give positive numbers"),
        ({"rates": "fast"}, "--rates: 'fast' is not auto"),
        ({"repeats": 0}, "--repeats: 0"),
        ({"output_len": 1}, "--output-len: 1"),
        ({"prompts": 0}, "--prompts: 0"),
    ],
)
def test_settings_that_cannot_be_run(settings, says):
    with pytest.raises(UserError, match=says):
        SpeedSettings(**settings)


def test_requests_of_a_run():
    loads = [Load(128, concurrency=n) for n in (1, 4, 16)]
    assert [SpeedSettings().prompts_under(load) for load in loads] == [2, 8, 32]
    assert SpeedSettings(prompts=5).prompts_under(loads[2]) == 5
    # Of arrivals 20 seconds, but not too few.
    assert [SpeedSettings().prompts_under(Load(128, rate=r)) for r in (0.1, 1.51)] == [8, 31]


def test_every_length_at_every_concurrency():
    settings = SpeedSettings(concurrency=(4, 1), input_len=(512, 32), rates="auto")
    assert [(load.input_len, load.concurrency) for load in settings.closed_loads] == [
        (32, 1),
        (32, 4),
        (512, 1),
        (512, 4),
    ]
    assert (settings.count, settings.longest) == (12, 544)
    assert SpeedSettings(rates=(2.0, 0.5)).rates == (0.5, 2.0)
    assert rates_of_peak(1.234) == [0.31, 0.62, 0.93, 1.2]


def test_runs_of_one_load_as_one():
    def run(speed, ttft):
        latency = {"ttft_ms": {"mean": ttft}}
        return {**latency, "output_tokens_per_s": speed, "requests": 4, "duration_s": 1.5}

    assert combine([run(10.0, 5.0), run(12.0, 8.0), run(40.0, 6.0)]) == {
        "ttft_ms": {"mean": 6.0},
        "output_tokens_per_s": 12.0,
        "requests": 12,
        "duration_s": 4.5,
        "rounds": [10.0, 12.0, 40.0],
    }
