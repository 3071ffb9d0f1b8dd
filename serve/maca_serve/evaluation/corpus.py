"""Evaluation text: where it comes from, and its token ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maca_serve.common.errors import UserError
from maca_serve.common.jsonl import read_rows, read_text

DEFAULT_TEXT = Path(__file__).parents[1] / "assets" / "evaluation.jsonl"


@dataclass(frozen=True)
class Corpus:
    """Documents in file order.

    Attributes:
        path: the file they came from.
        sha256: of the file's bytes.
        documents: the texts.
    """

    path: Path
    sha256: str
    documents: list[str]


@dataclass(frozen=True)
class Tokens:
    """A corpus as one tokenizer sees it.

    Attributes:
        prefix: special tokens that the tokenizer puts in front of a text (BOS, or nothing).
        documents: token ids of each document by itself, without special tokens.
    """

    prefix: list[int]
    documents: list[list[int]]


def read_corpus(path: Path | None = None) -> Corpus:
    """Read a `.txt` file (one document) or a `.jsonl` file (`text` in each row).

    Args:
        path: the file; the package's own English sample when None.

    Raises:
        UserError: missing, unreadable or empty file, another suffix, a broken or wrong row.
    """
    path = path or DEFAULT_TEXT
    if not path.is_file():
        raise UserError(f"{path}: no such text file")
    if path.suffix == ".jsonl":
        documents = _read_jsonl(path)
    elif path.suffix == ".txt":
        documents = [read_text(path)]
    else:
        raise UserError(f"{path}: evaluation text must be .txt or .jsonl")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{path}: holds no text")
    return Corpus(path, hashlib.sha256(path.read_bytes()).hexdigest(), documents)


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, row in read_rows(path, ("text",)):
        if not isinstance(row["text"], str):
            raise UserError(f"{path}: line {number}: 'text' is not a string")
        documents.append(row["text"])
    return documents


def tokenize(tokenizer: Any, corpus: Corpus) -> Tokens:
    """Token ids of each document by itself, and the tokenizer's prefix.

    Args:
        tokenizer: a transformers tokenizer.
        corpus: the documents.
    """
    prefix, _ = special_tokens(tokenizer)
    encoded = tokenizer(corpus.documents, add_special_tokens=False, verbose=False)["input_ids"]
    return Tokens(prefix, [_without_prefix(list(ids), prefix) for ids in encoded])


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text (often BOS) and behind it (seldom EOS).

    Args:
        tokenizer: a transformers tokenizer.
    """
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _without_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """Take off the prefix that a text has itself, from a chat template: windows get it anyway."""
    while prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    return ids


def load_tokenizer(folder: Path) -> Any:
    """A checkpoint's tokenizer, from its folder alone.

    Raises:
        UserError: the folder has none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice on tokenizer settings is not for our users
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error
