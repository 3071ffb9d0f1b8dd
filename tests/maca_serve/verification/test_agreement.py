"""What is called agreement: differences against those of bfloat16 alone."""

import math

import pytest
import torch
from maca_serve.engine.client import Answer
from maca_serve.verification import agreement
from maca_serve.verification.agreement import Prediction, distance

PROMPTS = [[5] * 9] * 8 + [[5] * 33] * 2
VOCABULARY, TOP = 50, 4


def predictions(noise=0.0, seed=0, flip=False):
    """Of one model, moved by so much noise."""
    found = []
    draw = torch.Generator().manual_seed(0)
    moved = torch.Generator().manual_seed(seed + 1)
    for prompt in PROMPTS:
        shape = (len(prompt) - 1, VOCABULARY)
        logits = torch.randn(shape, generator=draw, dtype=torch.float64)
        logits += noise * torch.randn(shape, generator=moved, dtype=torch.float64)
        logprobs = logits.log_softmax(-1)
        first = logprobs.argmax(-1) + (1 if flip else 0)
        found.append(Prediction(logprobs[:, 0], logprobs[:, :TOP], first, torch.zeros(3)))
    return found


def statuses(engine, exact=None):
    checks = agreement.check_agreement(
        PROMPTS, engine, predictions(0.05, 1), exact or predictions()
    )
    return {check.name: check.status for check in checks}


def test_verify_passes_what_rounds_as_bfloat16_does():
    found = statuses(predictions(0.05, 2))
    assert set(found.values()) == {"pass"}
    assert {"prompts of 9 tokens", "prompts of 33 tokens"} < set(found)


def test_verify_fails_an_engine_several_times_as_far():
    found = statuses(predictions(0.35, 2))
    failed = [name for name, status in found.items() if status == "fail"]
    assert {"log-probabilities, mean", "KL divergence", "first choices"} <= set(failed)
    assert "prompts of 33 tokens" in failed


def test_verify_fails_long_prompts_alone():
    """As where a quantized cache goes wrong: the mean over all may not show it."""
    engine = predictions(0.05, 2)[:8] + predictions(0.3, 2)[8:]
    found = statuses(engine)
    assert found["prompts of 9 tokens"] == "pass"
    assert found["prompts of 33 tokens"] == "fail"


def test_verify_fails_other_first_choices():
    assert statuses(predictions(0.05, 2, flip=True))["first choices"] == "fail"


def test_verify_fails_a_new_token_far_behind():
    exact = predictions()
    far = Prediction(exact[0].own, exact[0].top, exact[0].first, torch.tensor([0.0, 5.0]))
    assert statuses(predictions(0.05, 2), [far, *exact[1:]])["greedy tokens"] == "fail"


def test_an_engine_without_any_error_passes_where_bfloat16_has_none():
    checks = agreement.check_agreement(PROMPTS, *[predictions()] * 3)
    assert {check.status for check in checks} == {"pass"}


def test_divergence_is_a_lower_bound_with_one_bucket_for_the_rest():
    p, q = torch.tensor([[0.5, 0.2, 0.3]]).double(), torch.tensor([[0.25, 0.25, 0.5]]).double()
    nothing = torch.zeros(1)
    some, exact = (Prediction(nothing, x[:, :2].log(), nothing, nothing) for x in (q, p))
    by_hand = 0.5 * math.log(2) + 0.2 * math.log(0.8) + 0.3 * math.log(0.6)
    assert distance([some], [exact]).divergence == pytest.approx(by_hand)


def test_one_nan_is_not_finite():
    fine = predictions()[0]
    assert fine.finite
    assert not Prediction(fine.own * math.nan, fine.top, fine.first, fine.behind).finite


class Model:
    """Says the same at every place."""

    def __call__(self, input_ids):
        self.seen = input_ids
        row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        return type("Out", (), {"logits": row.expand(1, input_ids.shape[1], 4)})


def test_places_of_a_model_line_up_with_those_of_the_engine():
    answer = Answer([-1.0, -2.0], [{3: -0.5, 1: -1.5}, {2: -0.1, 0: -3.0}], [0, 2])
    model = Model()
    found = agreement.of_model(model, [1, 3, 2], answer)
    assert model.seen.tolist() == [[1, 3, 2, 0]]
    assert found.own.exp().tolist() == pytest.approx([0.1, 0.2])
    assert found.top.exp().flatten().tolist() == pytest.approx([0.1, 0.3, 0.2, 0.4])
    assert found.first.tolist() == [0, 0]
    assert found.behind.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    engine = agreement.of_engine(answer)
    assert engine.first.tolist() == [3, 2]
    assert engine.top.tolist() == [[-0.5, -1.5], [-0.1, -3.0]]


def test_the_base_is_told_apart_only_where_it_differs_by_more_than_rounding():
    exact, engine = predictions(), predictions(0.05, 2)
    noise = distance(predictions(0.05, 1), exact)
    assert agreement.check_base(engine, exact, predictions(1.0, 3), noise).status == "pass"
    assert agreement.check_base(predictions(1.0, 3), exact, predictions(1.0, 3), noise).status == (
        "fail"
    )
    alike = agreement.check_base(engine, exact, predictions(0.05, 3), noise)
    assert alike.status == "not checked" and "too alike to tell apart" in alike.found
