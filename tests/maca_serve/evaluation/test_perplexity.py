import math
import statistics

import pytest
from maca_serve.engine.client import batches
from maca_serve.evaluation.corpus import Tokens
from maca_serve.evaluation.perplexity import count_tokens, score_perplexity, window_inputs

from maca_llmc.common.errors import UserError
from maca_llmc.common.stats import mean_and_error, perplexity

LENGTHS = (40, 64, 128)


def logprob(ids, place):
    return -(0.5 + (ids[place] % 13) / 7 + 3.0 / place)


class ToyClient:
    """Scores by `logprob` above, as the real one does through an engine."""

    def score(self, prompts, advance):
        for prompt in prompts:
            advance(len(prompt))
        return [[logprob(ids, i) for i in range(1, len(ids))] for ids in prompts]


def test_against_brute_force():
    prefix, documents = [1], [list(range(100, 500)), list(range(600, 900)), list(range(40))]
    inputs = window_inputs(Tokens(prefix, documents), LENGTHS, 4)
    seen = []
    found = score_perplexity(ToyClient(), inputs, seen.append)
    assert sum(seen) == count_tokens(inputs) == 4 * sum(LENGTHS)
    # Spans of 127 tokens, first spans of both long documents, then their second ones.
    ends = [100 + 127, 600 + 127, 100 + 254, 600 + 254]
    for length in LENGTHS:
        losses = []
        for end in ends:
            ids = prefix + list(range(end - (length - 1), end))
            assert len(ids) == length
            losses.append(-sum(logprob(ids, i) for i in range(length - 32, length)) / 32)
        nll = sum(losses) / 4
        error = statistics.stdev(losses) / 2
        assert found[str(length)].pop("losses") == pytest.approx(losses)
        assert found[str(length)] == pytest.approx(
            {
                "ppl": math.exp(nll),
                "stderr": math.exp(nll) * error,
                "nll": nll,
                "nll_stderr": error,
            }
        )


def test_perplexity_of_equal_losses_has_no_error():
    found = perplexity([2.0, 2.0, 2.0])
    assert found == pytest.approx({"ppl": math.e**2, "stderr": 0.0, "nll": 2.0, "nll_stderr": 0.0})


def test_error_of_a_proportion():
    mean, error = mean_and_error([1.0, 0.0, 0.0, 1.0, 1.0])
    assert (mean, error) == (0.6, pytest.approx(math.sqrt(0.6 * 0.4 / 4)))


@pytest.mark.parametrize(
    ("prefix", "lengths", "windows", "says"),
    [
        ([], (64,), 1, "1 gives no standard error"),
        ([1] * 10, (40, 64), 2, "40 is too short for 32 scored tokens and 10 before"),
    ],
)
def test_what_cannot_be_measured(prefix, lengths, windows, says):
    with pytest.raises(UserError, match=says):
        window_inputs(Tokens(prefix, [list(range(1000))]), lengths, windows)


def test_batches_hold_all_prompts_in_order():
    prompts = [[i] * size for i, size in enumerate((4000, 90, 20, 5000, 1))]
    assert [[len(p) for p in batch] for batch in batches(prompts)] == [
        [4000, 90],
        [20],
        [5000],
        [1],
    ]
    assert [p for batch in batches(prompts) for p in batch] == prompts
