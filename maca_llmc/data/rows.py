"""Documents out of rows: which column holds the text or the chat, and what is not used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from loguru import logger

from maca_llmc.common.errors import UserError
from maca_llmc.common.progress import tell
from maca_llmc.data.chats import Chat, Message, chat_in_text, is_chat, read_chat, read_tools

Document: TypeAlias = str | list[Message]

CHAT_COLUMNS = ("messages", "conversations")
COLUMNS = ("text", *CHAT_COLUMNS)
"""Looked for in this order when no column is named; the first that is not empty is taken."""
TOOLS = "tools"


class RowReader:
    """Reads documents from rows, and tells at the end what was left unused or mended.

    :param text_column: the column that holds the document; ``None`` for one of ``COLUMNS``.
    """

    def __init__(self, text_column: str | None) -> None:
        self._text_column = text_column
        self._wanted = COLUMNS if text_column is None else (text_column,)
        self._seen: dict[str, None] = {}  # in order
        self._used: dict[str, None] = {}
        self._mended: list[str] = []

    def read(self, row: Any, where: str) -> Document:
        """Return the document in one row: an object, or the bare text or list of messages.

        :raises UserError: no such column, or what is there is no document.
        """
        if not isinstance(row, dict):
            return self._document(row, where, None)
        self._seen.update(dict.fromkeys(row))
        for column in self.columns(list(row), where):
            if document := self._document(row[column], where, column):
                self._used[column] = None
                if isinstance(document, Chat) and row.get(TOOLS):
                    self._used[TOOLS] = None
                    document.tools = read_tools(self._mend(row[TOOLS], where), where)
                return document
        return ""

    def finds(self, present: Iterable[str]) -> list[str]:
        """Return the columns to look into, of those that are present."""
        present = set(present)
        return [column for column in self._wanted if column in present]

    def columns(self, present: Sequence[str], where: str) -> list[str]:
        """Return the columns to look into, as :meth:`finds` does.

        :raises UserError: there is none.
        """
        if found := self.finds(present):
            return found
        cure = "name the one that holds the text (--text-column)"
        if self._text_column is not None:
            cure = "name one of these (--text-column)"
        raise UserError(
            f"{where} has no column {' or '.join(map(repr, self._wanted))}: "
            f"it has {', '.join(map(str, present)) or 'none'}; {cure}"
        )

    def report(self, source: str) -> None:
        """Tell which columns were not used and how many rows were mended."""
        self.tell_unused(source, list(self._used), list(self._seen))
        if self._mended:
            logger.warning(
                f"{source}: halves of characters (lone surrogates) in {len(self._mended)} rows "
                f"are replaced by U+FFFD, first in {self._mended[0]}"
            )

    def tell_unused(self, source: str, used: Sequence[str], columns: Sequence[str]) -> None:
        """Tell which columns are left out."""
        if used and (unused := [str(column) for column in columns if column not in used]):
            tell(f"{source}: reading {', '.join(used)}; columns not used: {', '.join(unused)}")

    def _document(self, value: Any, where: str, column: str | None) -> Document:
        value = self._mend(value, where)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            return ""
        if isinstance(value, str):
            if chat := chat_in_text(value):
                return read_chat(chat, where)
            if column in CHAT_COLUMNS and value.lstrip()[0] in "[{":
                raise UserError(
                    f"{where}: {column!r} is a text that is no list of messages: write it in JSON"
                )
            return value
        if is_chat(value):
            return read_chat(value, where)
        cure = "mend or remove it"
        if column is not None:
            again = "another" if self._text_column else "the"
            cure = f"it is of type {type(value).__name__}; name {again} column that is"
            cure += " (--text-column)"
        raise UserError(
            f"{where} is neither text nor a list of messages with 'role' and 'content' (or 'from' "
            f"and 'value'){f' in {column!r}' if column else ''}: {cure}"
        )

    def _mend(self, value: Any, where: str) -> Any:
        """Replace halves of characters such as "\\ud83d", which no tokenizer takes."""
        mended = replace_surrogates(value)
        if mended != value and where not in self._mended[-1:]:
            self._mended.append(where)
        return mended


def read_rows(rows: Iterable[tuple[str, Any]], reader: RowReader) -> list[Document]:
    """Return the documents of rows that come with where they are; blank ones are left out."""
    documents = [reader.read(row, where) for where, row in rows]
    return [document for document in documents if document]


def replace_surrogates(value: Any) -> Any:
    """Copy a value with U+FFFD for each lone surrogate; two that belong together are joined."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {key: replace_surrogates(each) for key, each in value.items()}
    if isinstance(value, list):
        return [replace_surrogates(each) for each in value]
    return value
