from types import SimpleNamespace

import pytest
from maca_serve.accuracy_plan import AccuracyPlan
from maca_serve.settings import AccuracySettings


@pytest.mark.parametrize(
    ("lengths", "prompts", "longest"), [((512,), [], 513), ((64, 256), [30, 300], 301)]
)
def test_the_engine_has_room_for_the_longest_request_and_one_token(lengths, prompts, longest):
    question = SimpleNamespace(prompts=[[0] * count for count in prompts])
    plan = AccuracyPlan(
        AccuracySettings(lengths=lengths),
        corpus=None,
        prefix=[],
        inputs={length: [] for length in lengths},
        questions={"some": [question]} if prompts else {},
        probes={},
        harness=None,
    )
    assert plan.longest == longest
