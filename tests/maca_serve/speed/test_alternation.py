import pytest
from maca_serve.engine.fit import ENGINE_BYTES, GIB, Fit
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.speed import alternation
from maca_serve.speed.alternation import BENCHMARK_BYTES, Visit, schedule

CPU, CUDA = "0.32.0+cpu", "0.32.0"


@pytest.fixture
def three(make_checkpoint):
    checkpoints = [open_checkpoint(make_checkpoint(name)) for name in "abc"]
    return checkpoints, [Fit([], {"VLLM_CPU_KVCACHE_SPACE": "1"})] * 3


@pytest.fixture
def free(monkeypatch):
    """Set the free memory."""

    def give(size: int) -> None:
        monkeypatch.setattr(alternation, "available_memory", lambda: size)

    return give


NEEDED = BENCHMARK_BYTES + 3 * (1000 + GIB + ENGINE_BYTES)


def test_all_up_together_where_they_fit(three, free):
    free(NEEDED)
    found = schedule(*three, CPU, 2)
    assert found.visits == [Visit((0, 1, 2), (0, 1))]
    assert (found.together, found.starts) == (True, 3)
    assert found.describe(list("abc"), 2)["order"] == list("abccba")


def test_blocks_where_they_do_not_fit(three, free):
    free(NEEDED - 1)
    found = schedule(*three, CPU, 2)
    # A B C C B A, where C's two turns are one start.
    assert found.visits == [
        Visit((0,), (0,)),
        Visit((1,), (0,)),
        Visit((2,), (0, 1)),
        Visit((1,), (1,)),
        Visit((0,), (1,)),
    ]
    assert (found.together, found.starts) == (False, 5)
    assert "13.0 GiB together, 13.0 GiB are free" in found.why
    assert found.describe(list("abc"), 2)["engines"] == "one at a time"


def test_a_card_takes_one_engine(three, free):
    free(100 * NEEDED)
    assert schedule(*three, CUDA, 2).starts == 5
    assert schedule(*three, CUDA, 1).starts == 3


def test_nothing_to_alternate(three, free):
    free(0)
    assert schedule(*three, CPU, 0).visits == [Visit((i,), ()) for i in range(3)]
    alone = schedule([three[0][0]], [three[1][0]], CPU, 3)
    assert alone.visits == [Visit((0,), (0, 1, 2))]
