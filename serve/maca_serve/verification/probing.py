"""What the running engine answers: all prompts in one request, and each by itself."""

from collections.abc import Callable
from dataclasses import dataclass

from maca_serve.engine.client import Answer, Client
from maca_serve.verification.prompts import NEW_TOKENS, Prompt

# Most likely tokens asked for at every place; vLLM gives 20 at most.
TOP = 10


@dataclass(frozen=True)
class Answers:
    """One engine's answers, in the order of the prompts.

    Attributes:
        together: in a batch of all.
        alone: each in a batch of one.
    """

    together: list[Answer]
    alone: list[Answer]


def probe(client: Client, prompts: list[Prompt], advance: Callable[[int], None]) -> Answers:
    """Ask the engine.

    Args:
        client: of the engine.
        prompts: token ids.
        advance: called with the prompt tokens of each finished request.

    Raises:
        RequestError: it failed; BrokenAnswerError where a log-probability is none.
    """
    together = client.complete(prompts, NEW_TOKENS, TOP)
    advance(sum(map(len, prompts)))
    alone = []
    for prompt in prompts:
        alone += client.complete([prompt], NEW_TOKENS, TOP)
        advance(len(prompt))
    return Answers(together, alone)
