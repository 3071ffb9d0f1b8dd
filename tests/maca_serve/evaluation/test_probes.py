import pytest
from maca_serve.common.errors import UserError
from maca_serve.engine.client import Answer
from maca_serve.evaluation.corpus import Tokens
from maca_serve.evaluation.probes import DEPTHS, count_probe_tokens, make_probes, score_probes

LENGTHS = (200, 400)
PREFIX = [7]
# Two documents of letters, far from the digits and words of a needle.
TOKENS = Tokens(PREFIX, [[1000 + i % 300 for i in range(2000)], [2000 + i for i in range(900)]])


class Characters:
    """A tokenizer of one token per character."""

    def __call__(self, text, add_special_tokens, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


class ToyClient:
    """Gives each token -0.5, and has 5 as the likeliest token at the places in `wrong`."""

    def __init__(self, wrong=()):
        self.wrong = wrong

    def complete(self, prompts, new_tokens, top):
        assert top == 1
        return [
            Answer(
                [-0.5 - 0.25 * (place in self.wrong) for place in range(1, len(ids))],
                [
                    {5: -0.4} if place in self.wrong else {ids[place]: -0.5}
                    for place in range(1, len(ids))
                ],
                [0],
            )
            for ids in prompts
        ]


def make(kind, lengths=LENGTHS, windows=6, seed=0):
    return make_probes(kind, TOKENS, Characters(), lengths, windows, seed)


def spell(ids):
    return "".join(chr(token) if token < 1000 else "_" for token in ids)


def test_needles_say_what_they_ask_for_at_every_depth():
    probes = make("needle")
    assert probes == make("needle")
    assert probes != make("needle", seed=1)
    for length, prompts in probes.items():
        for number, probe in enumerate(prompts):
            assert len(probe.ids) == length
            assert probe.ids[:1] == PREFIX
            text = spell(probe.ids[1:])
            asked, answer = text[: -probe.answer], text[-probe.answer :]
            sentence = asked.strip("_").splitlines()[-1].strip("_") + answer + "."
            assert len(answer) == len(" 1234567") and answer[1:].isdigit()
            # Once in the text, and no other number anywhere.
            assert asked.count(sentence) == 1
            filler = text.replace(f"\n{sentence}\n", "|").replace(sentence[:-1], "").strip("\n")
            before = filler.index("|") / (len(filler) - 1)
            assert before == pytest.approx(DEPTHS[number % 5], abs=0.01)


def test_a_window_has_the_same_needle_and_ending_at_every_length():
    short, long = make("needle").values()
    for one, other in zip(short, long, strict=True):
        assert one.ids[-60:][-one.answer :] == other.ids[-other.answer :]
        filler = [[t for t in probe.ids if t >= 1000] for probe in (one, other)]
        assert filler[1][-len(filler[0]) :] == filler[0]


def test_copies_are_copies_of_random_tokens_of_the_text():
    probes = make("copy", lengths=(200, 401))
    assert probes == make("copy", lengths=(200, 401))
    known = {token for document in TOKENS.documents for token in document}
    for length, prompts in probes.items():
        half = (length - 1) // 2
        for probe in prompts:
            assert probe.ids == PREFIX + 2 * probe.ids[1 : 1 + half]
            assert probe.answer == half - 1
            assert set(probe.ids[1:]) <= known
    first, second = (prompts[0].ids for prompts in probes.values())
    assert second[:100] == first[:100]
    assert len({tuple(probe.ids) for probe in probes[200]}) == 6


def test_only_the_answer_is_scored():
    probes = {20: make("copy", lengths=(21,))[21]}
    # Prompts of 21: the second copy is places 11 to 20, scored from 12 on. 5 is never right.
    seen = []
    early = score_probes(ToyClient(wrong=range(1, 12)), probes, seen.append)["20"]
    assert sum(seen) == count_probe_tokens(probes) == 6 * 21
    assert (early["logprob"], early["exact"], early["right"]) == (-0.5, 1.0, 1.0)
    assert early["logprob_stderr"] == 0.0
    late = score_probes(ToyClient(wrong=[20]), probes, seen.append)["20"]
    assert late["logprob"] == pytest.approx(-0.5 - 0.25 / 9)
    assert (late["exact"], late["right"]) == (0.0, pytest.approx(8 / 9))
    assert late["logprobs"] == pytest.approx([late["logprob"]] * 6)
    assert late["prompts"] == 6


@pytest.mark.parametrize(("kind", "length"), [("needle", 80), ("copy", 4)])
def test_lengths_too_short(kind, length):
    with pytest.raises(UserError, match=f"--lengths: {length} is too short for the task `{kind}`"):
        make(kind, lengths=(length, 400))
