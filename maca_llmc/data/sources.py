"""Documents out of anything: text files, JSONL, folders, Hugging Face datasets, lists.

A document is a text or a list of chat messages. Nothing here tokenizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from maca_llmc.errors import UserError

Document: TypeAlias = str | list[dict[str, Any]]
Source: TypeAlias = str | Path | Dataset | list[Any] | None

ASSETS = Path(__file__).resolve().parent.parent / "assets"
CALIBRATION_SAMPLE = ASSETS / "calibration.jsonl"
EVALUATION_SAMPLE = ASSETS / "evaluation.jsonl"

COLUMNS = ("text", "messages")  # looked for in this order when no column is named
TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".json")
TABLE_SUFFIXES = {".parquet": "parquet", ".csv": "csv"}  # suffix: the builder of load_dataset
OFFLINE = "without the hub, give a text file, a .jsonl file or a folder"


def read_documents(
    source: Source,
    *,
    text_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
) -> Sequence[Document]:
    """Return the documents of ``source``, in a fixed order.

    :param source: one of

        - ``None``: the shipped English sample (``CALIBRATION_SAMPLE``);
        - a ``.txt`` or ``.md`` file (one document), a ``.jsonl`` file (a row per line), a ``.json``
          file (a list of rows), a ``.parquet`` or ``.csv`` file;
        - a folder written by ``Dataset.save_to_disk``, a folder holding parquet files (a data
          set's repository), or else a folder of ``.txt``, ``.md`` and ``.jsonl`` files, read
          sorted by path, hidden ones left out;
        - any other string: the name of a data set on the Hugging Face hub;
        - a ``datasets.Dataset``;
        - a list of texts, of lists of messages, or of rows.
    :param text_column: the column (key) that holds the document; ``None`` takes ``text``, else
        ``messages``. Plain text files have no columns.
    :param split: which split, for data sets on the hub or on disk.
    :param config_name: which configuration, for data sets on the hub or in a repository folder.
    :return: documents; those of a ``Dataset`` are read row by row when indexed. A file's blank
        rows are left out.
    :raises UserError: no such file, unreadable content (with file and line), missing column,
        unreachable hub, no data.
    """
    documents = _read(source, text_column, split, config_name)
    if not len(documents):
        raise UserError(f"{describe_source(source)} holds no text: give other data")
    return documents


def describe_source(source: Source, *, split: str = "train", config_name: str | None = None) -> str:
    """Name ``source`` in a few words, for messages and run records."""
    if source is None:
        return f"the shipped English sample ({CALIBRATION_SAMPLE.name})"
    if isinstance(source, Dataset):
        return f"a datasets.Dataset of {len(source)} rows"
    if isinstance(source, list):
        return f"a list of {len(source)} documents"
    if Path(source).expanduser().exists():
        return str(source)
    return f"{source}{f'/{config_name}' if config_name else ''} ({split})"


def _read(
    source: Source, text_column: str | None, split: str, config_name: str | None
) -> Sequence[Document]:
    if source is None:
        source = CALIBRATION_SAMPLE
    if isinstance(source, Dataset):
        return DatasetDocuments(source, text_column, describe_source(source))
    if isinstance(source, list):
        return _row_documents(source, text_column, "list item")
    if not isinstance(source, str | Path):
        raise UserError(
            f"cannot read data from {type(source).__name__}: give a path, a hub name, "
            "a datasets.Dataset or a list"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, text_column, split, config_name)
    if path.is_file():
        return _read_file(path, text_column)
    return _read_hub(str(source), text_column, split, config_name)


def _read_folder(
    folder: Path, text_column: str | None, split: str, config_name: str | None
) -> Sequence[Document]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(folder)
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise UserError(f"{folder} has no split {split!r}: it has {', '.join(saved)}")
            saved = saved[split]
        return DatasetDocuments(saved, text_column, str(folder))
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    if any(path.suffix.lower() == ".parquet" for path in files):
        return _load(str(folder), text_column, path=str(folder), name=config_name, split=split)
    readable = [path for path in files if path.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl")]
    if not readable:
        raise UserError(f"{folder} holds no .txt, .md, .jsonl or .parquet file and no saved data")
    return [document for path in readable for document in _read_file(path, text_column)]


def _read_file(path: Path, text_column: str | None) -> Sequence[Document]:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return _load(
            str(path),
            text_column,
            path=TABLE_SUFFIXES[suffix],
            data_files=str(path),
            split="train",  # what the builder calls its only split
        )
    if suffix not in (*TEXT_SUFFIXES, *ROW_SUFFIXES):
        known = ", ".join((*TEXT_SUFFIXES, *ROW_SUFFIXES, *TABLE_SUFFIXES))
        raise UserError(f"{path}: unknown kind of file: give one of {known}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8"
        ) from error
    if suffix in TEXT_SUFFIXES:
        return [text] if text.strip() else []
    if suffix == ".json":
        rows = _parse(text, str(path))
        if not isinstance(rows, list):
            raise UserError(f"{path} is not a list of rows: a row per line goes into a .jsonl file")
        return _row_documents(rows, text_column, f"{path} row")
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() cuts at U+2028 too
        if line.strip():
            where = f"{path} line {number}"
            documents.append(_row_document(_parse(line, where), text_column, where))
    return [document for document in documents if document]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg} at column {error.colno}): mend or remove it"
        ) from error


def _read_hub(
    name: str, text_column: str | None, split: str, config_name: str | None
) -> Sequence[Document]:
    suffixes = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *TABLE_SUFFIXES)
    if name.startswith(("/", ".", "~")) or name.lower().endswith(suffixes) or name.count("/") > 1:
        raise UserError(f"{name}: no such file or folder: check the path")
    return _load(name, text_column, path=name, name=config_name, split=split)


def _load(where: str, text_column: str | None, **arguments: Any) -> Sequence[Document]:
    """Call ``load_dataset`` and turn what goes wrong into one line."""
    try:
        dataset = load_dataset(**arguments)
    except ConnectionError as error:
        raise UserError(
            f"{where} is no file or folder here, and the hub cannot be reached: {OFFLINE}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # unknown name, configuration or split
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot load the data set {where}: {reason} (check --split and --config-name)"
        ) from error
    return DatasetDocuments(dataset, text_column, where)


class DatasetDocuments(Sequence[Document]):
    """The documents of a ``datasets.Dataset``, read row by row: a large one stays on disk.

    :raises UserError: the column is missing; on indexing, a value that is not a document.
    """

    def __init__(self, dataset: Dataset, text_column: str | None, where: str) -> None:
        self._where = where
        self._column = _pick_column(dataset.column_names, text_column, where)
        self._dataset = dataset.select_columns([self._column]).with_format(None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return _check(self._dataset[index][self._column], f"{self._where} row {index + 1}")


def _row_documents(rows: list[Any], text_column: str | None, where: str) -> list[Document]:
    documents = [
        _row_document(row, text_column, f"{where} {number}")
        for number, row in enumerate(rows, start=1)
    ]
    return [document for document in documents if document]


def _row_document(row: Any, text_column: str | None, where: str) -> Document:
    """Return the document in one row: an object, or the bare text or list of messages."""
    if isinstance(row, dict):
        return _check(row[_pick_column(list(row), text_column, where)], where)
    return _check(row, where)


def _pick_column(columns: Sequence[str], text_column: str | None, where: str) -> str:
    for column in COLUMNS if text_column is None else (text_column,):
        if column in columns:
            return column
    wanted = " or ".join(map(repr, COLUMNS)) if text_column is None else repr(text_column)
    raise UserError(
        f"{where} has no column {wanted}: it has {', '.join(columns) or 'none'}; "
        "name the one that holds the text (--text-column)"
    )


def _check(value: Any, where: str) -> Document:
    """Return a text or a list of messages as it is; blank text becomes ``""``."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message and "content" in message
        for message in value
    ):
        return value
    raise UserError(
        f"{where} is neither text nor a list of messages with 'role' and 'content': "
        "name the column that is (--text-column)"
    )
