from types import SimpleNamespace

import pytest
from maca_serve.common.errors import UserError
from maca_serve.evaluation.plan import AccuracyPlan, plan_accuracy
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.measuring.settings import AccuracySettings


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


def test_lm_eval_is_refused_where_the_tokenizer_ends_texts(base, ending_tokenizer_files, text):
    for file in ending_tokenizer_files.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    settings = AccuracySettings(text=text, lengths=(64,), windows=2, tasks=("arc_easy",))
    with pytest.raises(UserError, match=r"arc_easy: the tokenizer of .* ends every text with EOS"):
        plan_accuracy(settings, [open_checkpoint(base)])
