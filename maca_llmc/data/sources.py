"""Documents out of anything: text files, JSONL, folders, Hugging Face datasets, lists.

A document is a text or a list of chat messages. Nothing here tokenizes.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.utils import logging
from pyarrow import ArrowException

from maca_llmc.common.defaults import ASSETS
from maca_llmc.common.errors import UserError
from maca_llmc.common.jsonl import cut_lines, parse, parse_rows, read_text
from maca_llmc.common.progress import tell
from maca_llmc.data.chats import without_none
from maca_llmc.data.rows import COLUMNS, TOOLS, Document, RowReader, read_rows

Source: TypeAlias = str | Path | Dataset | list[Any] | None

CALIBRATION_SAMPLE = ASSETS / "calibration.jsonl"

TEXT_SUFFIXES = (".txt", ".md")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".csv")
SUFFIXES = (*FILE_SUFFIXES, ".parquet")
NOT_DATA = (
    *("readme", "license", "licence", "copying", "notice", "authors", "citation", "changelog"),
    *("changes", "contributing", "code_of_conduct", "security", "requirements", "todo"),
    *("dataset_info", "dataset_infos", "dataset_dict", "config", "package"),
)
"""How names begin, before a dot or a dash, of what explains a folder of data."""
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
          file (a list of rows, or a row per line), a ``.parquet`` or ``.csv`` file;
        - a folder written by ``Dataset.save_to_disk``, a folder holding parquet files (a data
          set's repository), or else a folder of the other files above, read sorted by path. What
          is hidden is left out, and what explains the data (``README.md``, ``requirements.txt``);
        - any other string: the name of a data set on the Hugging Face hub;
        - a ``datasets.Dataset``;
        - a list of texts, of lists of messages, or of rows.
    :param text_column: the column (key) that holds the document; ``None`` takes the first of
        ``text``, ``messages`` and ``conversations`` (ShareGPT's) that is not empty in a row.
        ``tools`` beside a chat go to the chat template. Plain text files have no columns.
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
        return DatasetDocuments(source, RowReader(text_column), describe_source(source))
    if isinstance(source, list):
        reader = RowReader(text_column)
        rows = ((f"list item {number}", row) for number, row in enumerate(source, start=1))
        documents = read_rows(rows, reader)
        reader.report(describe_source(source))
        return documents
    if not isinstance(source, str | Path):
        raise UserError(
            f"cannot read data from {type(source).__name__}: give a path, a hub name, "
            "a datasets.Dataset or a list"
        )
    path = Path(source).expanduser()
    reader = RowReader(text_column)
    if path.is_dir():
        return _read_folder(path, reader, split, config_name)
    if path.is_file():
        found = _read_file(path, reader)
        if path.parent != ASSETS:
            reader.report(str(path))
        return found
    return _read_hub(str(source), reader, split, config_name)


def _read_folder(
    folder: Path, reader: RowReader, split: str, config_name: str | None
) -> Sequence[Document]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return DatasetDocuments(_load_saved(folder, split), reader, str(folder))
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    data = [path for path in files if path.suffix.lower() in SUFFIXES and not _explains(path)]
    if any(path.suffix.lower() == ".parquet" for path in data):
        dataset = _load(str(folder), path=str(folder), name=config_name, split=split)
        kind = f".{getattr(dataset, 'builder_name', None) or 'parquet'}"
        data = [path for path in data if path.suffix.lower() == kind]
        _tell_files(folder, data, files)
        return DatasetDocuments(dataset, reader, str(folder))
    data = [path for path in data if not _is_settings(path, reader)]
    if not data:
        raise UserError(f"{folder} holds no {', '.join(SUFFIXES)} file of data and no saved data")
    documents = [document for path in data for document in _read_file(path, reader)]
    _tell_files(folder, data, files)
    reader.report(str(folder))
    return documents


def _explains(path: Path) -> bool:
    """Say whether a file is about the data, or about software beside them."""
    name = path.name.lower().replace("-", ".").partition(".")[0]
    return name in NOT_DATA


def _is_settings(path: Path, reader: RowReader) -> bool:
    """Say whether a ``.json`` file is one object that is no row of data."""
    if path.suffix.lower() != ".json":
        return False
    rows = parse_rows(read_text(path), str(path))
    return len(rows) == 1 and isinstance(rows[0][1], dict) and not reader.finds(rows[0][1])


def _tell_files(folder: Path, data: list[Path], files: list[Path]) -> None:
    left = [path for path in files if path not in data]
    words = f"{folder}: reading {_name_some(folder, data)}"
    tell(words + (f"; not reading {_name_some(folder, left)}" if left else ""))


def _name_some(folder: Path, paths: list[Path], most: int = 8) -> str:
    shown = ", ".join(str(path.relative_to(folder)) for path in paths[:most])
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _read_file(path: Path, reader: RowReader) -> Sequence[Document]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        dataset = _load(str(path), path="parquet", data_files=str(path), split="train")
        return DatasetDocuments(dataset, reader, str(path))
    if suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: unknown kind of file: give one of {', '.join(SUFFIXES)}")
    text = read_text(path)
    if suffix in TEXT_SUFFIXES:
        return [text] if text.strip() else []
    if suffix == ".json":
        return read_rows(parse_rows(text, str(path)), reader)
    if suffix == ".csv":
        return read_rows(_csv_rows(text, path), reader)
    lines = cut_lines(text, str(path))
    return read_rows(((where, parse(line, where)) for where, line in lines), reader)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a CSV file, each with where it ends.

    :raises UserError: quotes that do not match, or another number of fields than of columns.
    """
    limit = csv.field_size_limit(sys.maxsize)  # a document may be longer than 131,072 characters
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(lines, [])
        for fields in lines:
            if not fields:
                continue
            where = f"{path} line {lines.line_num}"
            if len(fields) != len(columns):
                raise UserError(
                    f"{where} has {len(fields)} fields and the first line {len(columns)}: put "
                    "fields with commas or line ends between double quotes"
                )
            yield where, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path} line {lines.line_num} is not CSV ({error}): double each quote in a field, or "
            "write JSON Lines"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _load_saved(folder: Path, split: str) -> Dataset:
    """Open what ``Dataset.save_to_disk`` has written."""
    try:
        saved = load_from_disk(folder)
    except (OSError, ValueError, LookupError, TypeError, ArrowException) as error:
        raise UserError(
            f"the saved data set {folder} cannot be read ({_first_line(error)}): save it again"
        ) from error
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise UserError(f"{folder} has no split {split!r}: it has {', '.join(saved)}")
    return saved[split]


def _read_hub(
    name: str, reader: RowReader, split: str, config_name: str | None
) -> Sequence[Document]:
    if name.startswith(("/", ".", "~")) or name.lower().endswith(SUFFIXES) or name.count("/") > 1:
        raise UserError(f"{name}: no such file or folder: check the path")
    return DatasetDocuments(_load(name, path=name, name=config_name, split=split), reader, name)


def _load(where: str, **arguments: Any) -> Dataset:
    """Call ``load_dataset`` and turn what goes wrong into one line."""
    try:
        with _quiet_datasets():
            return load_dataset(**arguments)
    except ConnectionError as error:
        raise UserError(
            f"{where} is no file or folder here, and the hub cannot be reached: {OFFLINE}"
        ) from error
    except DatasetsError as error:
        cause = error.__cause__ or error
        cure = "mend the file, or check --split and --config-name"
        raise _cannot_load(where, cause, cure) from error
    except (OSError, ValueError, RuntimeError, ArrowException) as error:
        cure = "check --split and --config-name"  # an unknown name, configuration or split
        if "data_files" in arguments:
            cure = "the file is cut short or damaged: make or download it again"
        raise _cannot_load(where, error, cure) from error


def _cannot_load(where: str, error: BaseException, cure: str) -> UserError:
    return UserError(f"cannot load the data set {where}: {_first_line(error)} ({cure})")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep what ``datasets`` logs of a failure to itself: the exception says it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class DatasetDocuments(Sequence[Document]):
    """The documents of a ``datasets.Dataset``, read row by row: a large one stays on disk.

    :raises UserError: the column is missing; on indexing, a value that is not a document.
    """

    def __init__(self, dataset: Dataset, reader: RowReader, where: str) -> None:
        self._where, self._reader = where, reader
        columns = dataset.column_names
        wanted = reader.columns(columns, where)
        if TOOLS in columns and wanted != [COLUMNS[0]] and TOOLS not in wanted:
            wanted = [*wanted, TOOLS]
        self._dataset = dataset.select_columns(wanted).with_format(None)
        reader.tell_unused(where, wanted, columns)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        where = f"{self._where} row {index + 1}"
        try:
            row = self._dataset[index]
        except (OSError, ValueError, ArrowException) as error:
            raise UserError(
                f"{where} cannot be read ({_first_line(error)}): make or download the data again"
            ) from error
        # Every row has the keys of all rows; those that are not its own are None.
        return self._reader.read({**dict.fromkeys(row), **without_none(row)}, where)
