"""A language model whose log-probabilities a test can work out by hand."""


def logprob(ids: list[int], place: int) -> float:
    """Depends on the token, the one before it, and how much stands before them."""
    return -(1.0 + ((31 * ids[place - 1] + 7 * ids[place]) % 97) / 50.0 + 4.0 / place)
