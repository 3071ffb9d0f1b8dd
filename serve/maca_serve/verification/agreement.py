"""How far the engine's answers lie from float32, against how far bfloat16 alone does.

The exact answer is the dequantized checkpoint in float32. The same in bfloat16, in transformers,
is off by rounding; a correct kernel in bfloat16 rounds elsewhere, by about as much. So every limit
is a multiple of what bfloat16 alone does to this very checkpoint on these very tokens.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from maca_serve.engine.client import Answer
from maca_serve.verification.checks import Check, held, not_checked
from maca_serve.verification.prompts import Prompt

# Means: an engine whose activations are rounded to 8 bits is at 6 to 9.
MEAN = 2.0
# The largest of a thousand differences scatters, and moves by itself.
LARGEST = 4.0
# A divergence is quadratic in the differences.
DIVERGENCE = MEAN**2
# Places whose log-probabilities over the whole vocabulary are held at once: of a vocabulary of
# 262,144 and 2048 places they would take 4 GiB.
AT_ONCE = 256
# Share of places at which near ties may fall otherwise beyond MEAN times bfloat16's own.
FLIPS = 0.01
NEARER = "nearer to it than to the base"


@dataclass(frozen=True)
class Prediction:
    """What one model says about one prompt of n tokens, log-probabilities in nats.

    Attributes:
        own: of each prompt token but the first, [n - 1].
        top: of the tokens that the engine found most likely there, [n - 1, k].
        first: the model's own first choice there, [n - 1].
        behind: by how much each of the engine's new tokens lies behind its first choice, [new];
            empty for the engine itself.
    """

    own: torch.Tensor
    top: torch.Tensor
    first: torch.Tensor
    behind: torch.Tensor

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        parts = (self.own, self.top, self.behind)
        return all(bool(torch.isfinite(part).all()) for part in parts)


def of_engine(answer: Answer) -> Prediction:
    """The engine's own answer in this form."""
    top = torch.tensor([list(place.values()) for place in answer.top], dtype=torch.float64)
    first = torch.tensor([next(iter(place)) for place in answer.top])
    own = torch.tensor(answer.own, dtype=torch.float64)
    return Prediction(own, top, first, torch.empty(0))


@torch.inference_mode()
def of_model(model: Any, prompt: Prompt, answer: Answer) -> Prediction:
    """What a transformers model says where the engine gave that answer."""
    sequence = torch.tensor(prompt + answer.new_tokens)
    logits = model(input_ids=sequence[None, :-1]).logits[0]
    places = len(prompt) - 1
    tokens = torch.tensor([list(place) for place in answer.top])
    # What only the prompt has is not looked at where new tokens begin.
    tokens = functional.pad(tokens, (0, 0, 0, len(logits) - places))
    parts = [
        _look_up(*part)
        for part in zip(*(t.split(AT_ONCE) for t in (logits, sequence[1:], tokens)), strict=True)
    ]
    own, top, first, behind = map(torch.cat, zip(*parts, strict=True))
    return Prediction(own[:places], top[:places], first[:places], behind[places:])


def _look_up(logits: torch.Tensor, own: torch.Tensor, top: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of tokens and top tokens, the first choice, how far tokens lie behind."""
    found = logits.float().log_softmax(-1).double()
    logprobs = found.gather(1, own[:, None])[:, 0]
    best, first = found.max(-1)
    return [logprobs, found.gather(1, top), first, best - logprobs]


def of_all(
    model: Any, prompts: list[Prompt], answers: list[Answer], advance: Callable[[int], None]
) -> list[Prediction]:
    """The same for all prompts; `advance` is called with the tokens of each."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        found.append(of_model(model, prompt, answer))
        advance(len(prompt))
    return found


@dataclass(frozen=True)
class Distance:
    """How far predictions lie from the exact ones.

    Attributes:
        mean: absolute difference of the prompt tokens' log-probabilities, nats.
        largest: the largest of them.
        flips: share of places with another first choice.
        likely: the largest for the engine's first choice of each place; unlikely tokens are off by
            more.
        divergence: KL divergence from the exact, nats, over the engine's top tokens and one
            bucket of all others: a lower bound of that over all tokens.
    """

    mean: float
    largest: float
    flips: float
    likely: float
    divergence: float


def distance(some: Iterable[Prediction], exact: Iterable[Prediction]) -> Distance:
    """Distance over all places of all prompts."""
    pairs = list(zip(some, exact, strict=True))
    differences = torch.cat([(a.own - b.own).abs() for a, b in pairs])
    flips = torch.cat([a.first != b.first for a, b in pairs])
    likely = torch.cat([(a.top[:, 0] - b.top[:, 0]).abs() for a, b in pairs])
    divergences = torch.cat([_divergence(b.top, a.top) for a, b in pairs])
    return Distance(
        float(differences.mean()),
        float(differences.max()),
        float(flips.double().mean()),
        float(likely.max()),
        float(divergences.mean()),
    )


def _divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) of every place, from log-probabilities [places, k]."""
    p, q = _with_rest(exact), _with_rest(other)
    return (p * (p.log() - q.log())).sum(-1)


def _with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    p = logprobs.exp()
    rest = 1 - p.sum(-1, keepdim=True)
    # Rounding may leave nothing, or less, for all other tokens.
    return torch.cat([p, rest], -1).clamp(min=1e-9)


def check_agreement(
    prompts: list[Prompt],
    engine: list[Prediction],
    rounded: list[Prediction],
    exact: list[Prediction],
) -> list[Check]:
    """The engine against float32, all prompts at once and prompts of each length.

    Args:
        prompts: token ids.
        engine: its answers.
        rounded: of the dequantized model in bfloat16.
        exact: of the same in float32.
    """
    found, noise = distance(engine, exact), distance(rounded, exact)
    flips = MEAN * noise.flips + FLIPS
    checks = [
        _hold(
            "log-probabilities, mean",
            found.mean,
            noise.mean,
            MEAN,
            from_bfloat16=distance(engine, rounded).mean,
        ),
        _hold("log-probabilities, largest", found.largest, noise.largest, LARGEST),
        _hold("KL divergence", found.divergence, noise.divergence, DIVERGENCE),
        held(
            "first choices",
            found.flips <= flips,
            f"{1 - found.flips:.1%} agree",
            f"at least {1 - flips:.1%} (bfloat16: {1 - noise.flips:.1%})",
            agreement=1 - found.flips,
            bfloat16=1 - noise.flips,
        ),
        _check_greedy(exact, noise),
    ]
    for length in dict.fromkeys(map(len, prompts)):
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ours, theirs, own = ([x[i] for i in chosen] for x in (engine, exact, rounded))
        mean, base = distance(ours, theirs).mean, distance(own, theirs).mean
        checks.append(_hold(f"prompts of {length} tokens", mean, base, MEAN))
    return checks


def check_batches(together: list[Answer], alone: list[Answer], noise: Distance) -> Check:
    """Whether a prompt by itself is answered as among all others.

    Args:
        together: answers of one batch.
        alone: answers of batches of one.
        noise: what bfloat16 alone does.
    """
    found = distance(map(of_engine, together), map(of_engine, alone))
    same = sum(a.new_tokens == b.new_tokens for a, b in zip(together, alone, strict=True))
    mean, largest = MEAN * noise.mean, LARGEST * noise.largest
    return held(
        "alone and in a batch",
        found.mean <= mean and found.largest <= largest,
        f"mean {found.mean:.4f}, largest {found.largest:.3f} nats apart;"
        f" new tokens of {same} of {len(alone)} prompts the same",
        f"mean {mean:.4f}, largest {largest:.3f}",
        mean=found.mean,
        largest=found.largest,
        same_new_tokens=same,
        prompts=len(alone),
    )


def check_base(
    engine: list[Prediction], exact: list[Prediction], base: list[Prediction], noise: Distance
) -> Check:
    """Whether the engine is nearer to its checkpoint than to the unquantized model.

    Args:
        engine: its answers.
        exact: of the dequantized checkpoint.
        base: of the unquantized model.
        noise: what bfloat16 alone does.
    """
    own, other = distance(engine, exact), distance(engine, base)
    apart = distance(exact, base).mean
    if apart <= MEAN * noise.mean:
        why = f"the base is {apart:.4f} nats away, and bfloat16 alone {noise.mean:.4f}"
        return not_checked(NEARER, f"too alike to tell apart: {why}")
    return held(
        NEARER,
        own.mean < other.mean,
        f"{own.mean:.4f} nats from it",
        f"less than the {other.mean:.4f} from the base (KL {other.divergence:.4f})",
        from_checkpoint=own.mean,
        from_base=other.mean,
        divergence_from_base=other.divergence,
    )


def _check_greedy(exact: list[Prediction], noise: Distance) -> Check:
    """Every token that the engine chose is float32's first choice, or nearly as likely.

    Two tokens may change places where the errors of both add up to what lies between them.
    """
    behind = torch.cat([prediction.behind for prediction in exact])
    firsts = int((behind <= 0).sum())
    worst, limit = float(behind.max()), 2 * MEAN * noise.likely
    return held(
        "greedy tokens",
        worst <= limit,
        f"{firsts} of {len(behind)} are float32's first choice, the worst {worst:.3f} nats behind",
        f"{limit:.3f} ({2 * MEAN:g} x bfloat16's largest for likely tokens)",
        first_choices=firsts,
        tokens=len(behind),
        worst_behind=worst,
        limit=limit,
    )


def _hold(name: str, found: float, noise: float, factor: float, **numbers: float) -> Check:
    ratio = found / noise if noise > 0 else math.inf if found > 0 else 0.0
    return held(
        name,
        ratio <= factor,
        f"{found:.4f} nats, {ratio:.2f} x bfloat16 alone",
        f"{factor:g} x ({factor * noise:.4f})",
        found=found,
        bfloat16=noise,
        ratio=ratio,
        factor=factor,
        **numbers,
    )
