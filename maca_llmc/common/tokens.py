"""Token ids of texts, and the special tokens that a tokenizer puts around them."""

from typing import Any


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a transformers tokenizer puts in front of a text (often BOS) and behind (seldom EOS)."""
    bare, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens, whatever its length."""
    # verbose=False: a document longer than the model's context is no fault here.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def without_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """Take off the prefix that a text has itself, from a chat template: inputs get it anyway."""
    while prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    return ids
