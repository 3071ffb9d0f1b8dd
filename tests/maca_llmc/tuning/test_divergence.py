"""Divergence from kept answers, against the whole vocabulary in float64."""

import pytest
import torch

from maca_llmc.tuning.divergence import Answers, WeightedDivergence, divergence, top_answers

VOCABULARY = 40


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 300, VOCABULARY, generator=generator)


def full_divergence(base, model):
    p, q = base.double().log_softmax(-1), model.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def bucket_divergence(base, model, k):
    """The k largest answers of the base and the rest, by brute force in float64."""
    p, q = base.double().softmax(-1), model.double().softmax(-1)
    found = []
    for row in range(len(base)):
        best = p[row].topk(k).indices
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[best] = False
        pairs = [(p[row, j], q[row, j]) for j in best] + [(p[row, rest].sum(), q[row, rest].sum())]
        found.append(sum(a * (a / b).log() for a, b in pairs))
    return torch.stack(found)


def test_all_but_one_answer_is_the_whole_divergence(logits):
    base, model = logits
    found = divergence(model, top_answers(base, VOCABULARY - 1))
    torch.testing.assert_close(found.double(), full_divergence(base, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_rest_is_one_bucket(logits, k):
    base, model = logits
    found = divergence(model, top_answers(base, k)).double()
    torch.testing.assert_close(found, bucket_divergence(base, model, k), rtol=1e-4, atol=1e-5)
    assert (found <= full_divergence(base, model) + 1e-5).all()


def test_more_answers_come_closer(logits):
    base, model = logits
    full = full_divergence(base, model).mean()
    errors = [full - divergence(model, top_answers(base, k)).mean() for k in (2, 8, 32)]
    assert errors[0] > errors[1] > errors[2] > -1e-6


@pytest.mark.parametrize("k", [3, VOCABULARY - 1])
def test_gradient_against_finite_differences(logits, k):
    base, model = logits[:, :4]
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25])
    leaf = model.clone().requires_grad_()
    loss = WeightedDivergence.apply(leaf, top_answers(base, k), weights)
    loss.backward()
    torch.testing.assert_close(
        loss.detach().double(),
        (weights * bucket_divergence(base, model, k)).sum(),
        rtol=1e-4,
        atol=0,
    )
    step = 1e-5
    for row, column in ((0, 0), (1, 7), (2, 19), (3, 39)):
        shift = torch.zeros_like(model, dtype=torch.float64)
        shift[row, column] = step
        up, down = (
            (weights * bucket_divergence(base, model.double() + sign * shift, k)).sum()
            for sign in (1, -1)
        )
        torch.testing.assert_close(
            leaf.grad[row, column].double(), (up - down) / (2 * step), rtol=1e-3, atol=1e-6
        )


def test_answers_of_16_bits_are_close(logits):
    base, model = logits
    answers = top_answers(base, 20)
    half = Answers(answers.ids, answers.logs.half())
    torch.testing.assert_close(
        divergence(model, half).mean(), divergence(model, answers).mean(), rtol=2e-3, atol=0
    )
