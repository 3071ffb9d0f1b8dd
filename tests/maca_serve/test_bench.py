import pytest
from maca_serve.bench import Benchmark
from maca_serve.checkpoint import open_checkpoint
from maca_serve.engine import Engine
from maca_serve.errors import EngineError, RequestError, UserError
from maca_serve.fit import Fit
from maca_serve.settings import SpeedSettings


@pytest.fixture
def engine(fake_vllm, quantized) -> Engine:
    return Engine(open_checkpoint(quantized), Fit([], {}))


def run(engine, concurrency=1):
    with Benchmark(SpeedSettings()) as benchmark, engine:
        return benchmark.run(engine, concurrency)


def test_one_process_runs_every_level(engine):
    with Benchmark(SpeedSettings(prompts=6)) as benchmark, engine:
        one, four = (benchmark.run(engine, n) for n in (1, 4))
    assert (one["requests"], four["requests"]) == (6, 6)
    assert (one["output_tokens_per_s"], four["output_tokens_per_s"]) == (10.0, 40.0)
    assert one["total_tokens_per_s"] == 50.0
    assert [one[f"{m}_ms"]["p99"] for m in ("ttft", "tpot", "itl", "e2el")] == [100, 200, 300, 400]


def test_failures_are_named(fake_vllm, engine):
    fake_vllm("bench fails")
    with pytest.raises(RequestError, match="bench serve failed: ValueError: no such data set"):
        run(engine)


def test_dropped_requests_are_no_result(fake_vllm, engine):
    fake_vllm("bench drops")
    with pytest.raises(RequestError, match="1 of 8 requests failed at concurrency 4"):
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
            benchmark.run(engine, 1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"concurrency": ()}, "positive"),
        ({"concurrency": (0, 1)}, "positive"),
        ({"concurrency": (4, 4)}, "stands twice"),
        ({"input_len": 0}, "--input-len: 0"),
        ({"output_len": 1}, "--output-len: 1"),
        ({"prompts": 0}, "--prompts: 0"),
    ],
)
def test_settings_that_cannot_be_run(settings, says):
    with pytest.raises(UserError, match=says):
        SpeedSettings(**settings)


def test_requests_of_a_run():
    assert [SpeedSettings().prompts_at(n) for n in (1, 4, 16)] == [4, 8, 32]
    assert SpeedSettings(prompts=5).prompts_at(16) == 5
