"""Evaluation text: where it comes from, and its token ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maca_llmc.common.defaults import EVALUATION_SAMPLE
from maca_llmc.common.errors import UserError, first_line
from maca_llmc.common.jsonl import parse, read_lines, read_text
from maca_llmc.common.tokens import encode, special_tokens, without_prefix


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
    path = path or EVALUATION_SAMPLE
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
    for where, line in read_lines(path):
        row = parse(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object")
        if "text" not in row:
            present = ", ".join(sorted(row)) or "none"
            raise UserError(f"{where} has no column 'text'; it has: {present}")
        if not isinstance(row["text"], str):
            raise UserError(f"{where}: 'text' is not a string")
        _check_characters(where, row["text"])
        documents.append(row["text"])
    return documents


def _check_characters(where: str, text: str) -> None:
    """Refuse halves of characters such as "\\ud83d", which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{where} holds {half}, half of a character (a lone surrogate): replace it"
        ) from error


def tokenize(tokenizer: Any, corpus: Corpus) -> Tokens:
    """Token ids of each document by itself, and the tokenizer's prefix.

    Args:
        tokenizer: a transformers tokenizer.
        corpus: the documents.
    """
    prefix, _ = special_tokens(tokenizer)
    encoded = [encode(tokenizer, document) for document in corpus.documents]
    return Tokens(prefix, [without_prefix(ids, prefix) for ids in encoded])


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
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
