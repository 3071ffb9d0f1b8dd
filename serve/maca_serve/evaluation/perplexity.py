"""Perplexity of the same target tokens by input length."""

import math
from collections.abc import Callable
from typing import Any

from maca_llmc.common.errors import UserError
from maca_llmc.common.stats import perplexity
from maca_llmc.evaluation.windows import TARGETS, check_lengths, cut_spans, window_input
from maca_serve.engine.client import Client
from maca_serve.evaluation.corpus import Tokens

# Window inputs of one length, keyed by that length.
Inputs = dict[int, list[list[int]]]


def window_inputs(tokens: Tokens, lengths: tuple[int, ...], windows: int) -> Inputs:
    """The inputs of every length, windows in the same order for each.

    Args:
        tokens: the evaluation text.
        lengths: increasing input lengths in tokens, checked by `check_lengths`.
        windows: how many target blocks.

    Raises:
        UserError: fewer than two windows (no standard error), too few in the text, or a shortest
            length that the tokenizer's own special tokens fill.
    """
    if windows < 2:
        raise UserError(f"--windows: {windows} gives no standard error; use at least 2")
    check_lengths(lengths, None, prefix=len(tokens.prefix))
    spans = cut_spans(tokens.documents, len(tokens.prefix), lengths[-1], windows)
    return {
        length: [window_input(tokens.prefix, span, length) for span in spans] for length in lengths
    }


def score_perplexity(
    client: Client, inputs: Inputs, advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Perplexity for each length, with standard errors over windows.

    Args:
        client: of the running engine.
        inputs: from `window_inputs`.
        advance: called with the tokens of each finished request.

    Returns:
        {length: {"ppl", "stderr", "nll", "nll_stderr", "losses"}}, lengths as strings for JSON;
        the losses are in nats per token, one for each window.

    Raises:
        RequestError: the engine failed.
    """
    found = {}
    for length, prompts in inputs.items():
        losses = [_block_loss(logprobs) for logprobs in client.score(prompts, advance)]
        found[str(length)] = perplexity(losses) | {"losses": losses}
    return found


def _block_loss(logprobs: list[float]) -> float:
    """Mean negative log-likelihood per token of the target block at the end, in nats."""
    return -math.fsum(logprobs[-TARGETS:]) / TARGETS


def count_tokens(inputs: Inputs) -> int:
    """Prompt tokens of all inputs."""
    return sum(len(prompt) for prompts in inputs.values() for prompt in prompts)
