"""Probes of long inputs that need no data set: find a fact in filler text, repeat a sequence.

Both ask for an answer whose tokens are known, so one request tells everything: the answer's
log-probability, and whether greedy decoding would have given it. It would, exactly if every token
of the answer is the likeliest after those before it.

lm-eval's `ruler` is no substitute here: its metrics begin at 4,096 tokens, so nothing is measured
of a model with a shorter context; its essays come from the hub; it generates its answers, at 128
tokens each; and it has nothing like `copy`.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maca_llmc.common.errors import UserError
from maca_llmc.common.stats import mean_and_error
from maca_llmc.common.tokens import encode
from maca_llmc.evaluation.windows import cut_spans
from maca_serve.engine.client import Answer, Client, batches
from maca_serve.evaluation.corpus import Tokens

NEEDLE = "needle"
COPY = "copy"
# Where the fact stands in the filler text: each window has the next of these in turn.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACES = ("Arnsby", "Belcombe", "Corwen", "Dunmore", "Elstow", "Fenwick", "Garrick", "Holme")


@dataclass(frozen=True)
class Probe:
    """One prompt.

    Attributes:
        ids: its tokens, special tokens and the right answer included.
        answer: how many of them, at the end, are the answer.
    """

    ids: list[int]
    answer: int


# Prompts of one length, keyed by that length; prompt i of each length goes with window i.
Probes = dict[int, list[Probe]]


@dataclass(frozen=True)
class _Fact:
    """A sentence that states a number, the same sentence up to the number, and the number."""

    sentence: list[int]
    cue: list[int]
    answer: list[int]


def make_probes(
    kind: str, tokens: Tokens, tokenizer: Any, lengths: tuple[int, ...], windows: int, seed: int
) -> Probes:
    """The prompts of a probe, `windows` of each length.

    Args:
        kind: NEEDLE or COPY.
        tokens: the evaluation text.
        tokenizer: a transformers tokenizer.
        lengths: of the prompts with their answers, in tokens, increasing.
        windows: prompts of a length; facts and sequences are the same at every length.
        seed: of facts and sequences.

    Raises:
        UserError: a length too short for the probe, or too little text.
    """
    draw = random.Random(seed)
    if kind == COPY:
        return _make_copies(draw, tokens, lengths, windows)
    facts = [_draw_fact(draw, tokenizer) for _ in range(windows)]
    spans = cut_spans(tokens.documents, len(tokens.prefix), lengths[-1], windows)
    return {
        length: [
            _hide(tokens.prefix, span, fact, depth, length)
            for span, fact, depth in zip(spans, facts, depths(windows), strict=True)
        ]
        for length in lengths
    }


def depths(windows: int) -> list[float]:
    """Where each window's fact stands: 0 is the beginning of the filler text, 1 its end."""
    return [DEPTHS[i % len(DEPTHS)] for i in range(windows)]


def score_probes(
    client: Client, probes: Probes, advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Log-probability and greedy answers for each length, with standard errors over prompts.

    Args:
        client: of the running engine.
        probes: from `make_probes`.
        advance: called with the tokens of each finished request.

    Returns:
        {length: {"logprob": mean per token of an answer in nats, "exact": share of answers that
        greedy decoding gives, "right": share of answers' tokens that are the likeliest at their
        place, each with its "_stderr", "logprobs": one for each prompt, "prompts"}}.

    Raises:
        RequestError: the engine failed.
    """
    return {
        str(length): _summarize(prompts, _ask(client, prompts, advance))
        for length, prompts in probes.items()
    }


def count_probe_tokens(probes: Probes) -> int:
    """Prompt tokens of all prompts."""
    return sum(len(probe.ids) for prompts in probes.values() for probe in prompts)


def _draw_fact(draw: random.Random, tokenizer: Any) -> _Fact:
    number = draw.randrange(1_000_000, 10_000_000)
    cue = f"\nThe secret number of {draw.choice(PLACES)} is"
    # Encoded together and then split: their border may change the tokens.
    opening = encode(tokenizer, cue)
    whole = encode(tokenizer, f"{cue} {number}")
    return _Fact(encode(tokenizer, f"{cue} {number}.\n"), opening, whole[len(opening) :])


def _hide(prefix: list[int], span: list[int], fact: _Fact, depth: float, length: int) -> Probe:
    needed = len(prefix) + len(fact.sentence) + len(fact.cue) + len(fact.answer)
    if length <= needed:
        raise UserError(
            f"--lengths: {length} is too short for the task `{NEEDLE}`, which takes {needed} tokens"
            " besides its filler text"
        )
    filler = span[len(span) - (length - needed) :]
    before = round(depth * len(filler))
    ids = prefix + filler[:before] + fact.sentence + filler[before:] + fact.cue + fact.answer
    return Probe(ids, len(fact.answer))


def _make_copies(
    draw: random.Random, tokens: Tokens, lengths: tuple[int, ...], windows: int
) -> Probes:
    """Random tokens of the text, twice; of the second time all but the first token are scored."""
    vocabulary = sorted({token for document in tokens.documents for token in document})
    longest = (lengths[-1] - len(tokens.prefix)) // 2
    sequences = [draw.choices(vocabulary, k=longest) for _ in range(windows)]
    probes: Probes = {}
    for length in lengths:
        half = (length - len(tokens.prefix)) // 2
        if half < 2:
            raise UserError(f"--lengths: {length} is too short for the task `{COPY}`")
        probes[length] = [Probe(tokens.prefix + 2 * s[:half], half - 1) for s in sequences]
    return probes


def _ask(client: Client, probes: list[Probe], advance: Callable[[int], None]) -> list[Answer]:
    answers = []
    for batch in batches([probe.ids for probe in probes]):
        answers += client.complete(batch, new_tokens=1, top=1)
        advance(sum(map(len, batch)))
    return answers


def _summarize(probes: list[Probe], answers: list[Answer]) -> dict[str, Any]:
    logprobs = []
    hits = []
    for probe, answer in zip(probes, answers, strict=True):
        logprobs.append(math.fsum(answer.own[-probe.answer :]) / probe.answer)
        ids, tops = probe.ids[-probe.answer :], answer.top[-probe.answer :]
        hits.append([token == next(iter(top)) for token, top in zip(ids, tops, strict=True)])
    measures = {
        "logprob": logprobs,
        "exact": [float(all(hit)) for hit in hits],
        "right": [sum(hit) / len(hit) for hit in hits],
    }
    summary: dict[str, Any] = {}
    for name, values in measures.items():
        summary[name], summary[f"{name}_stderr"] = mean_and_error(values)
    return {**summary, "logprobs": logprobs, "prompts": len(probes)}
