"""Read JSON, CSV, Parquet and Arrow tables into a memory-mapped dataset with the single column `text`.

The column is one of the table, or its rows as conversations (see `conversations`). Values are read verbatim: CSV fields are
not interpreted as numbers or missing values, JSON strings are not interpreted as dates, and a value that is not a string is
an error that states its row. The result is cached, and verified like a token stream, under a key that depends on the SHA-256
of the content of every file. (The builders of `datasets` infer and cast types, interpret file names as patterns, identify
files by modification time, and do not verify their cache.)
"""

import csv
import hashlib
import io
import json
import logging
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable

from ..errors import MiniGPTError, UnreadableFileError
from .cache import cached
from .conversations import COLUMNS as CONVERSATION_COLUMNS
from .conversations import Unread, messages_of, serialize
from .documents import rows_sha256
from .files import extension_of
from .reading import (
    BYTE_ORDER_MARK,
    Decoding,
    DecodingStatistics,
    byte_chunks,
    changed_file_error,
    compression_of,
    content_sha256,
    decoded,
    describe_undecodable,
    open_bytes,
    printable,
)

logger = logging.getLogger(__name__)

FEATURES = datasets.Features({"text": datasets.Value("large_string")})
BATCH_ROWS, BATCH_CHARACTERS = 10_000, 1_000_000  # limits of a written batch
VERSION = 3  # version of the format of the cache; 2 had CSV rows without the text column
UNREAD = "unread.txt"  # names of what is not read of conversations
# A CSV column is considered text if one of its first values is neither a number nor one of these.
INSPECTED_ROWS = 1_000
NOT_TEXT = {"", "na", "n/a", "nan", "null", "none", "true", "false"}
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}

# (all columns, columns of text, allowed columns) -> chosen column
ChooseColumn = Callable[[list[str], list[str], list[str]], str]


SURROGATE = re.compile("[\ud800-\udfff]")


class Table(ABC):
    """A table in a file; subclasses read one format each.

    Args:
        path: The file.
        name: Its name in messages.
        decoding: Encoding of the file, for text formats.
    """

    def __init__(self, path: str, name: str, decoding: Decoding):
        self.path, self.name, self.decoding = path, name, replace(decoding, newline="preserve")

    @abstractmethod
    def columns(self) -> tuple[list[str], list[str], list[str]]:
        """Return the names of all columns, of those that appear to contain text, and of those that may be chosen.

        Raises:
            UnreadableFileError: if the file is not a table.
        """

    @abstractmethod
    def texts(self, column: str, choose_column: ChooseColumn) -> Iterator[str | None]:
        """Yield the values of a column.

        Args:
            choose_column: Chooses again if rows have further columns of text, which `columns` did not find.

        Raises:
            UnreadableFileError: stating the row, if a value is not a string, or another column would be chosen.
        """

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the location of each row, for messages, and its values by column."""

    def column_names(self) -> list[str]:
        """Return the names of the columns, if the file states them before its rows; they may be repeated."""
        return []

    def conversations(self, system: str | None, unread: Unread) -> Iterator[str]:
        """Yield the conversation of each row, serialized.

        Args:
            system: Content of a system message for conversations that have none.
            unread: Receives the names of what is not read.

        Raises:
            UnreadableFileError: stating the row, if it is not a conversation.
        """
        names = self.column_names()
        if repeated := next((name for name in CONVERSATION_COLUMNS if names.count(name) > 1), None):
            raise self.error(f"{names.count(repeated)} columns are named {repeated!r}; rename all but one")
        for location, row in self.rows():
            try:
                yield serialize(messages_of(row, system))
            except ValueError as error:
                raise self.error(f"{location} {error}") from error
            unread.add(row)

    def describe(self) -> None:  # noqa: B027 (binary formats are not ambiguous)
        """Log how the file was interpreted, where this is ambiguous."""

    def report_undecodable(self) -> None:
        """Log how many bytes of a text file are replaced or dropped because they cannot be decoded."""
        if self.decoding.errors == "strict":
            return
        statistics = DecodingStatistics()
        for _ in decoded(self.path, self.name, self.decoding, 1 << 20, statistics):
            pass
        if statistics.undecodable:
            logger.warning(
                "%s contains %s", printable(self.name), describe_undecodable(self.decoding, statistics.undecodable)
            )

    def late_column_error(self, location: str, late: str, column: str) -> UnreadableFileError:
        """The error for a second column of text that begins after the first rows, on which the choice of `column` rests."""
        return self.error(
            f"{location} is the first one with the column {late!r}, and {column!r} was used up to there; choose one with "
            "--text_column"
        )

    def error(self, message: str) -> UnreadableFileError:
        return UnreadableFileError(f"{printable(self.name)}: {message}")

    @contextmanager
    def lines(self, newline: str) -> Iterator[Iterator[str]]:
        """Provide the lines of a text file without a byte order mark; `newline` as in `open`."""
        with open_bytes(self.path, self.name) as file:
            text = io.TextIOWrapper(file, self.decoding.encoding, self.decoding.errors, newline=newline)
            try:
                yield _without_byte_order_mark(text)
            except UnicodeError:
                for _ in decoded(self.path, self.name, self.decoding, 1 << 20):
                    pass  # raises the same error with the byte and its position
                raise


def _without_byte_order_mark(lines: Iterator[str]) -> Iterator[str]:
    first = next(lines, "")
    yield first.removeprefix(BYTE_ORDER_MARK)
    yield from lines


Texts = Callable[[Table], Iterator[str | None]]


def read_tables(
    data_format: str,
    paths: list[str],
    names: dict[str, str],
    decoding: Decoding,
    cache_dir: Path,
    choose_column: ChooseColumn,
    requested: str | None = None,
) -> datasets.Dataset:
    """Return the text column of tables of one format.

    Args:
        data_format: A key of `READERS`.
        paths: The files.
        names: Names to display instead of paths.
        decoding: Encoding of the files, for text formats.
        cache_dir: Root of the cache.
        choose_column: Maps the result of `Table.columns` to the name of a column.
        requested: The column that was requested, if any; without one, further columns of text are errors, see `Table.texts`.

    Raises:
        UnreadableFileError: if a table is damaged or empty, or its text column is missing, ambiguous or not text.
    """
    tables = [READERS[data_format](path, names.get(path, path), decoding) for path in paths]
    digests = [content_sha256(table.path, table.name) for table in tables]
    chosen: dict[str, Table] = {}
    empty = []
    for table in tables:
        columns = table.columns()
        if columns[0]:
            chosen.setdefault(choose_column(*columns), table)
        else:
            empty.append(table)
    if len(chosen) > 1:
        texts = ", ".join(f"{column!r} in {printable(table.name)}" for column, table in chosen.items())
        raise UnreadableFileError(f"the text is in different columns, {texts}; choose one with --text_column")
    if not chosen:
        raise tables[0].error("contains no text: the table has no rows")
    (column,) = chosen
    if empty:
        first, total = printable(empty[0].name), f"{len(tables):,}"
        logger.info(
            "%s of %s tables have no rows and are skipped: %s",
            f"{len(empty):,}",
            total,
            first + ", …" * (len(empty) > 1),
        )
    for table in tables:
        if table not in empty:
            table.describe()
    key = [data_format, column, requested]
    return _cached(tables, digests, key, lambda table: table.texts(column, choose_column), cache_dir)


def read_conversations(
    data_format: str,
    paths: list[str],
    names: dict[str, str],
    decoding: Decoding,
    cache_dir: Path,
    system: str | None,
) -> datasets.Dataset:
    """Return the conversations of tables of one format, serialized.

    Args:
        system: Content of a system message for conversations that have none. For the others see `read_tables`.

    Raises:
        UnreadableFileError: if a table is damaged or empty, or a row is not a conversation.
    """
    tables = [READERS[data_format](path, names.get(path, path), decoding) for path in paths]
    digests = [content_sha256(table.path, table.name) for table in tables]
    for table in tables:
        table.describe()
    unread = Unread()
    texts = lambda table: table.conversations(system, unread)  # noqa: E731
    return _cached(tables, digests, [data_format, "conversations", system], texts, cache_dir, unread)


def serialized_conversations(
    rows: datasets.Dataset, name: str, system: str | None, cache_dir: Path
) -> datasets.Dataset:
    """Return the conversations of a dataset, serialized, from the cache; `Dataset.map` would write next to its files.

    Args:
        name: Name to display.
        system: See `read_conversations`.

    Raises:
        UnreadableFileError: if a row is not a conversation.
    """

    unread = Unread()

    def texts() -> Iterator[str]:
        for number, row in enumerate(rows, 1):
            try:
                yield serialize(messages_of(row, system))
            except ValueError as error:
                raise UnreadableFileError(f"{name}: row {number:,} {error}") from error
            unread.add(row)

    key = ["conversations", rows_sha256(rows), system]
    return _stored(key, lambda file: _write_texts(texts(), file), cache_dir, name, unread)


def large_strings(rows: datasets.Dataset, name: str, cache_dir: Path) -> datasets.Dataset:
    """Return the column `text` of a dataset as `large_string`, from the cache; `Dataset.cast` would write next to its files.

    Args:
        name: Name to display.
    """

    def write(file: Path) -> None:
        _write_texts((row["text"] for row in rows), file)

    return _stored(["text", rows_sha256(rows)], write, cache_dir, name)


def _write_texts(texts: Iterator[str | None], file: Path) -> None:
    with ArrowWriter(features=FEATURES, path=str(file)) as writer:
        for batch in _batches(texts):
            writer.write_table(pa.table({"text": pa.array(batch, pa.large_string())}))
        writer.finalize()


def _cached(
    tables: list[Table],
    digests: list[str],
    key: list[Any],
    texts: Texts,
    cache_dir: Path,
    unread: Unread | None = None,
) -> datasets.Dataset:
    """Return the texts of tables from the cache.

    Args:
        digests: SHA-256 of each file.
        key: Identifies, together with the content of the files, the texts.
        unread: See `_stored`.
    """
    files = [(extension_of(table.name), digest) for table, digest in zip(tables, digests, strict=True)]
    write = partial(_write, tables, digests, texts)
    name = tables[0].name + (", …" if len(tables) > 1 else "")
    return _stored([*key, asdict(tables[0].decoding), files], write, cache_dir, name, unread)


def _stored(
    key: list[Any], write: Callable[[Path], None], cache_dir: Path, name: str, unread: Unread | None = None
) -> datasets.Dataset:
    """Return the texts with this key from the cache.

    Args:
        write: Writes them to a file.
        name: Name to display.
        unread: Names of what is not read of conversations, complete after `write`. They are logged, also if the texts are in
            the cache.
    """
    fingerprint = hashlib.sha256(json.dumps([VERSION, *key]).encode()).hexdigest()[:32]

    def write_all(folder: Path) -> None:
        write(folder / "rows.arrow")
        if names := str(unread or ""):
            (folder / UNREAD).write_text(printable(names), encoding="utf-8")

    def read(folder: Path) -> tuple[datasets.Dataset, str]:
        # By default the fingerprint would depend on the modification time of the file.
        rows = datasets.Dataset(MemoryMappedTable.from_file(str(folder / "rows.arrow")), fingerprint=fingerprint)
        return rows, (folder / UNREAD).read_text(encoding="utf-8") if (folder / UNREAD).is_file() else ""

    rows, names = cached(cache_dir / "tables" / fingerprint, write_all, read, cache_dir, "text column of a table")
    if names:
        logger.info("%s: columns that are not read: %s", printable(name), names)
    return rows


def _write(tables: list[Table], digests: list[str], texts: Texts, file: Path) -> None:
    is_empty = True
    with ArrowWriter(features=FEATURES, path=str(file)) as writer:
        for table, digest in zip(tables, digests, strict=True):
            rows = 0
            for batch in _batches(texts(table)):
                is_empty = False
                try:
                    writer.write_table(pa.table({"text": pa.array(batch, pa.large_string())}))
                except UnicodeEncodeError as error:  # JSON can contain lone surrogates
                    row = next(i for i, text in enumerate(batch) if text and SURROGATE.search(text))
                    raise table.error(
                        f"row {rows + row + 1:,} contains a lone surrogate, which is not a character; remove the row"
                    ) from error
                rows += len(batch)
            if content_sha256(table.path, table.name) != digest:
                raise changed_file_error(table.name)
        if is_empty:
            raise tables[0].error("contains no text: the table has no rows")
        writer.finalize()


def _batches(texts: Iterator[str | None]) -> Iterator[list[str | None]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text or "")
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# -- JSON -------------------------------------------------------------------------------------------------------------


class JsonTable(Table):
    """JSON Lines, an array of objects or strings, or concatenated objects."""

    def describe(self) -> None:
        self.report_undecodable()

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        has_text: dict[str, bool] = {}
        for _, row in islice(self.rows(), INSPECTED_ROWS):
            for column, value in row.items():
                has_text[column] = has_text.get(column, False) or isinstance(value, str)
        text_columns = [column for column, is_text in has_text.items() if is_text]
        return list(has_text), text_columns, text_columns

    def texts(self, column: str, choose_column: ChooseColumn) -> Iterator[str | None]:
        _, text_columns, _ = self.columns()
        for location, row in self.rows():
            for late in [name for name in row if name not in text_columns and isinstance(row[name], str)]:
                text_columns.append(late)
                if choose_column(text_columns, text_columns, text_columns) != column:
                    raise self.late_column_error(location, late, column)
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise self.error(
                    f"{location}: {column!r} is {_abbreviated(text)}, not a string; convert it or remove the row"
                )
            yield text

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (location, row). A string in an array is a row with the column `text`."""
        with self.lines("\n") as lines:
            number, first = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
            if not first:
                return
            if first.lstrip().startswith("[") or not _is_json(first):
                yield from self._values(number, "".join([first, *lines]))
                return
            yield f"line {number:,}", self._row(f"line {number:,}", self._parsed(number, first))
            for following, line in enumerate(lines, number + 1):
                if line.strip():
                    yield f"line {following:,}", self._row(f"line {following:,}", self._parsed(following, line))

    def _values(self, number: int, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of a file that does not have one value per line: an array, or values that span lines.

        Args:
            number: Line number of the start of `content`.
        """
        position = row = 0
        while found := _NOT_SPACE.search(content, position):
            position = found.start()
            try:
                value, position = _DECODER.raw_decode(content, position)
            except ValueError as error:
                line = number + content.count(
                    "\n", 0, error.pos if isinstance(error, json.JSONDecodeError) else position
                )
                raise self.error(f"line {line:,} is not JSON: {error}") from error
            except RecursionError as error:
                raise self.error(f"line {number:,} is nested too deeply") from error
            for each in value if isinstance(value, list) else [value]:
                row += 1
                yield f"row {row:,}", self._row(f"row {row:,}", {"text": each} if isinstance(each, str) else each)

    def _parsed(self, number: int, line: str) -> Any:
        try:
            return _DECODER.decode(line)
        except ValueError as error:
            raise self.error(f"line {number:,} is not JSON: {error}") from error
        except RecursionError as error:
            raise self.error(f"line {number:,} is nested too deeply") from error

    def _row(self, location: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{location} is not a JSON object")
        return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise MiniGPTError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _abbreviated(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


# -- CSV --------------------------------------------------------------------------------------------------------------


class CsvTable(Table):
    """Comma-separated values, or tab-separated values (.tsv), with a header row."""

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        rows = self._rows()
        header = next(rows, [])
        has_text, is_empty = dict.fromkeys(header, False), True
        for row in islice(rows, INSPECTED_ROWS):
            is_empty = False
            for column, value in zip(header, row, strict=False):
                has_text[column] = has_text[column] or _is_text(value)
        if is_empty:
            return [], [], []
        self._check_delimiter(header)
        return header, [column for column, is_text in has_text.items() if is_text], header

    def texts(self, column: str, choose_column: ChooseColumn) -> Iterator[str | None]:
        rows = self._rows()
        header = next(rows, [column])
        if header.count(column) > 1:
            raise self.error(f"{header.count(column)} columns are named {column!r}; rename all but one")
        index, (_, text_columns, _) = header.index(column), self.columns()
        for number, row in enumerate(rows, 1):
            for late in [
                name for name, value in zip(header, row, strict=False) if name not in text_columns and _is_text(value)
            ]:
                text_columns.append(late)
                if choose_column(header, text_columns, header) != column:
                    raise self.late_column_error(f"row {number:,}", late, column)
            if index >= len(row) and any(map(_is_text, row)):  # typically the rest of a text that contains a line end
                raise self.error(
                    f"row {number:,} has {len(row)} of the {len(header)} fields of the header, and not the column "
                    f"{column!r}; quote fields that contain a line end, or remove the row"
                )
            yield row[index] if index < len(row) else None

    def column_names(self) -> list[str]:
        return next(self._rows(), [])

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = self._rows()
        header = next(rows, [])
        for number, row in enumerate(rows, 1):
            yield f"row {number:,}", dict(zip(header, row, strict=False))

    def describe(self) -> None:
        self.report_undecodable()
        logger.info(
            "%s: the first row is the header, %s", printable(self.name), ", ".join(map(repr, self.column_names()))
        )
        rows = self._rows()
        header = next(rows, [])
        is_short = [len(row) < len(header) for row in islice(rows, INSPECTED_ROWS)]
        if any(is_short):
            logger.warning(
                "%s: %s of the first %s rows have fewer fields than the header: a line end that is part of a field must be "
                "quoted, otherwise it ends the row",
                *(printable(self.name), f"{sum(is_short):,}", f"{len(is_short):,}"),
            )
        if self._delimiter == "\t":
            with self.lines("") as lines:
                first = islice(lines, INSPECTED_ROWS)
                quoted = sum(value.startswith('"') for line in first for value in line.rstrip("\r\n").split("\t"))
            if quoted:  # many programs write TSV files without quoting, so quotes may be text
                logger.warning(
                    "%s: %s fields in the first %s lines begin with a quote: quotes around a field are removed, as in CSV; "
                    "if they are part of the text, double them",
                    *(printable(self.name), f"{quoted:,}", f"{INSPECTED_ROWS:,}"),
                )

    @property
    def _delimiter(self) -> str:
        return "\t" if extension_of(self.name) == ".tsv" else ","

    def _rows(self) -> Iterator[list[str]]:
        """Yield the fields of each row that is not blank, starting with the header."""
        csv.field_size_limit(sys.maxsize)
        header = None
        with self.lines("") as lines:
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            try:
                for row in reader:
                    header = header or row
                    if len(row) > len(header) and any(row[len(header) :]):
                        raise self.error(
                            f"the row that ends on line {reader.line_num:,} has {len(row)} fields and the header "
                            f"{len(header)}; quote fields that contain a {'comma' if self._delimiter == ',' else 'tab'}"
                        )
                    if row:
                        yield row
            except csv.Error as error:
                raise self.error(f"line {reader.line_num:,}: {error}") from error

    def _check_delimiter(self, header: list[str]) -> None:
        """Raise an error if the header is a single field that contains another delimiter."""
        for delimiter, plural in OTHER_DELIMITERS.items():
            if len(header) == 1 and delimiter in header[0]:
                raise self.error(
                    f"its only column is {header[0]!r}, so its fields appear to be separated by {plural}; convert it to "
                    "commas (.csv) or tabs (.tsv), or use --data_format text"
                )


def _is_text(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value.strip().lower() not in NOT_TEXT
    return False


# -- Parquet and Arrow ------------------------------------------------------------------------------------------------


class ArrowTable(Table):
    """An Arrow IPC file or stream."""

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        with self._opened() as source:
            schema = self._schema(source)
        text_columns = [field.name for field in schema if _is_string(field.type)]
        return schema.names, text_columns, text_columns

    def texts(self, column: str, choose_column: ChooseColumn) -> Iterator[str | None]:
        with self._opened() as source:
            schema = self._schema(source)
            if (number := schema.names.count(column)) != 1:
                raise self.error(f"{number} columns are named {column!r}; rename all but one")
            column_type = schema.field(column).type
            if not _is_string(column_type):
                raise self.error(f"the column {column!r} contains values of type {column_type}, not text")
            rows = 0
            for batch in self._values(source, column):
                try:
                    texts = batch.to_pylist()
                except UnicodeDecodeError as error:  # Arrow does not check the bytes that it reads
                    row = rows + next(i for i in range(1, len(batch) + 1) if not _is_utf8(batch[i - 1]))
                    raise self.error(f"row {row:,} is not UTF-8 text ({error.reason}); remove the row") from error
                rows += len(texts)
                yield from texts

    def column_names(self) -> list[str]:
        with self._opened() as source:
            return self._schema(source).names

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._opened() as source:
            number = 0
            for batch in self._batches(source, None):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:  # Arrow does not check the bytes that it reads
                    raise self.error(f"a row after row {number:,} is not UTF-8 text ({error.reason})") from error
                for row in rows:
                    number += 1
                    yield f"row {number:,}", row

    def _schema(self, source: pa.NativeFile) -> pa.Schema:
        return _ipc_reader(source).schema

    def _values(self, source: pa.NativeFile, column: str) -> Iterator[pa.Array]:
        for batch in self._batches(source, [column]):
            yield batch.column(column)

    def _batches(self, source: pa.NativeFile, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        """Yield the rows, at least with the given columns."""
        reader = _ipc_reader(source)
        if isinstance(reader, pa.RecordBatchFileReader):
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader
            end = source.tell()
            if source.size() != end:  # the reader ignores what follows
                raise self.error(
                    f"more data follow the end of its Arrow stream, at byte {end:,}; give joined files one by one"
                )

    @contextmanager
    def _opened(self) -> Iterator[pa.NativeFile]:
        """Open the file; a compressed file is decompressed to a temporary file, because random access is required."""
        try:
            if compression_of(self.name):
                with tempfile.TemporaryFile() as decompressed:
                    for chunk in byte_chunks(self.path, self.name, 1 << 20):
                        decompressed.write(chunk)
                    yield pa.PythonFile(decompressed)
            else:
                with pa.OSFile(self.path) as source:
                    yield source
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


class ParquetTable(ArrowTable):
    """A Parquet file."""

    def _schema(self, source: pa.NativeFile) -> pa.Schema:
        return pq.ParquetFile(source).schema_arrow

    def _batches(self, source: pa.NativeFile, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        yield from pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=columns)


def _ipc_reader(source: pa.NativeFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    source.seek(0)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _is_string(data_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    return any(
        is_type(data_type) for is_type in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_utf8(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


# Formats of `files.FORMATS` other than text.
READERS: dict[str, type[Table]] = {"json": JsonTable, "csv": CsvTable, "parquet": ParquetTable, "arrow": ArrowTable}
