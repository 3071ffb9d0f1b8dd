"""Input lengths that perplexity is measured at."""

from collections.abc import Sequence

from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.windows import check_lengths

CONTEXT = "context"


def resolve_lengths(lengths: Sequence[int | str], context: int | None) -> tuple[int, ...]:
    """Lengths with the model's context in place of the word `context`, checked.

    Args:
        lengths: input lengths in tokens, or that word.
        context: the model's context in tokens, None when its config does not say.

    Raises:
        UserError: another word, that word without a known context, or as `check_lengths`.
    """
    numbers = []
    for length in lengths:
        if length == CONTEXT and context is None:
            raise UserError("--lengths: config.json says no context of the model; give a number")
        number = context if length == CONTEXT else length
        if not isinstance(number, int):
            raise UserError(f"--lengths: {length!r} is neither a number nor `{CONTEXT}`")
        numbers.append(number)
    check_lengths(numbers, context)
    return tuple(numbers)
