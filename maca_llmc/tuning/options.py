"""What decides a tuning run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockOptions:
    """Of the stage that goes through the model layer by layer.

    :param steps: gradient steps of each layer
    :param step_tokens: tokens of each, in windows drawn at random
    :param batch_tokens: tokens that go through a layer together
    :param rate: how far the first step moves a weight, in codes; it falls to nothing
    :param scale_rate: so of the logarithms of scale factors
    :param length_exponent: p of the token weight ``L^-p``
    :param first_token_weight: how many times the weight of its window's tokens the first one gets
    :param check_every: steps between two looks at held-out windows
    :param sensitivity_tokens: to learn from what errors of channels cost in the end, by which they
        are weighed; 0 weighs all channels alike
    """

    steps: int = 50
    step_tokens: int = 1024
    batch_tokens: int = 2048
    rate: float = 0.0075
    scale_rate: float = 1e-3
    length_exponent: float = 1.0
    first_token_weight: float = 1.0
    check_every: int = 10
    sensitivity_tokens: int = 8192


@dataclass(frozen=True)
class EndToEndOptions:
    """Of the stage that learns scales from the base's answers.

    :param step_tokens: tokens of a step, in windows drawn at random
    :param batch_tokens: tokens that go through the model together
    :param rate: Adam's, of the logarithms of scale factors; it falls to nothing
    :param epochs: how often each window comes
    :param answers: of the base that are kept for each token; the rest is one bucket
    :param length_exponent: p of the token weight ``L^-p``
    :param checks: looks at held-out windows
    """

    step_tokens: int = 512
    batch_tokens: int = 2048
    rate: float = 1e-3
    epochs: int = 1
    answers: int = 256
    length_exponent: float = 1.0
    checks: int = 8
