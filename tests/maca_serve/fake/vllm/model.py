"""A language model whose log-probabilities a test can work out by hand."""


def logprob(ids: list[int], place: int) -> float:
    """Depends on the token, the one before it, and how much stands before them."""
    return -(1.0 + ((31 * ids[place - 1] + 7 * ids[place]) % 97) / 50.0 + 4.0 / place)


def other_tokens(count: int) -> dict[int, float]:
    """Log-probabilities of the most likely tokens besides the prompt's own, at every place."""
    return {100 + i: -(1.5 + i) for i in range(count)}
