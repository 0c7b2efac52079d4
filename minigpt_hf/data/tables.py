"""Text columns of tables, as a memory-mapped `datasets.Dataset` with the single column `text`.

Values are read verbatim: a CSV field is never taken for a number or a missing value, a JSON string never for a date, and a
value that is not a string is an error that names its row. The column is stored in the cache, sealed and verified like a
token stream, under a key that contains the SHA-256 of the content of every file. (The builders of `datasets` infer and
cast types, take file names for patterns, identify files by modification time, and do not verify what they cached.)
"""

import csv
import hashlib
import io
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from .files import ending_of
from .reading import BYTE_ORDER_MARK, Decoding, chunks, decoded, digest_of, has_changed, open_bytes, packing_of, shown

logger = logging.getLogger(__name__)

FEATURES = datasets.Features({"text": datasets.Value("large_string")})
BATCH_ROWS, BATCH_CHARACTERS = 10_000, 1_000_000  # written at a time
VERSION = 1  # of the format in the cache
# A CSV column is taken for text if one of its first values is neither a number, nor a truth value, nor one of these.
ROWS_LOOKED_AT = 1_000
NOT_TEXT = {"", "na", "n/a", "nan", "null", "none", "true", "false"}
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}

ChooseColumn = Callable[[list[str], list[str], list[str]], str]


class Table:
    """A file of one of `FORMATS`.

    Args:
        path: The file.
        name: Its name in messages.
    """

    def __init__(self, path: str, name: str, decoding: Decoding):
        self.path, self.name, self.decoding = path, name, replace(decoding, newline="preserve")

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        """Names of all columns, of those that seem to hold text, and of those that may be chosen.

        Raises:
            UnreadableFileError: if the file is not a table.
        """
        raise NotImplementedError

    def texts(self, column: str) -> Iterator[str | None]:
        """The values of a column.

        Raises:
            UnreadableFileError: naming the row, for a value that is not a string.
        """
        raise NotImplementedError

    def describe(self) -> None:
        """Log how the file was interpreted, where that is not obvious."""

    def error(self, message: str) -> UnreadableFileError:
        return UnreadableFileError(f"{shown(self.name)}: {message}")

    @contextmanager
    def lines(self, newline: str) -> Iterator[Iterator[str]]:
        """The lines of a text file, `newline` as in `open`, without a byte order mark."""
        with open_bytes(self.path, self.name) as file:
            text = io.TextIOWrapper(file, self.decoding.encoding, self.decoding.errors, newline=newline)
            try:
                yield _without_byte_order_mark(text)
            except UnicodeDecodeError:
                for _ in decoded(self.path, self.name, self.decoding, 1 << 20):  # names the byte and its position
                    pass
                raise


def _without_byte_order_mark(lines: Iterator[str]) -> Iterator[str]:
    first = next(lines, "")
    yield first.removeprefix(BYTE_ORDER_MARK)
    yield from lines


def read_tables(
    kind: str,
    paths: list[str],
    names: dict[str, str],
    decoding: Decoding,
    cache_dir: Path,
    choose_column: ChooseColumn,
) -> datasets.Dataset:
    """The text column of tables of one format.

    Args:
        kind: A key of `FORMATS`.
        names: The name to show for a path that has another.
        choose_column: Maps the result of `Table.columns` to the name of a column.

    Raises:
        UnreadableFileError: for a table that is damaged or empty, or whose text column is missing, ambiguous or not text.
    """
    tables = [FORMATS[kind](path, names.get(path, path), decoding) for path in paths]
    digests = [digest_of(table.path, table.name) for table in tables]
    chosen: dict[str, Table] = {}
    for table in tables:
        columns = table.columns()
        if columns[0]:
            chosen.setdefault(choose_column(*columns), table)
    if len(chosen) > 1:
        texts = ", ".join(f"{column!r} in {shown(table.name)}" for column, table in chosen.items())
        raise UnreadableFileError(f"the text is in different columns, {texts}; say which: --text_column")
    if not chosen:
        raise tables[0].error("there is no text in it: the table has no rows")
    (column,) = chosen
    for table in tables:
        table.describe()
    files = [(ending_of(table.name), digest) for table, digest in zip(tables, digests, strict=True)]
    key = hashlib.sha256(json.dumps([VERSION, kind, column, asdict(decoding), files]).encode()).hexdigest()[:32]
    return cached(
        cache_dir / "tables" / key,
        lambda folder: _write(tables, digests, column, folder / "rows.arrow"),
        # By default the fingerprint would depend on the modification time of the file.
        lambda folder: datasets.Dataset(MemoryMappedTable.from_file(str(folder / "rows.arrow")), fingerprint=key),
        cache_dir,
        "text column of a table",
    )


def _write(tables: list[Table], digests: list[str], column: str, file: Path) -> None:
    is_empty = True
    with ArrowWriter(features=FEATURES, path=str(file)) as writer:
        for table, digest in zip(tables, digests, strict=True):
            rows = 0
            for batch in _batches(table.texts(column)):
                is_empty = False
                try:
                    writer.write_table(pa.table({"text": pa.array(batch, pa.large_string())}))
                except UnicodeEncodeError as error:  # JSON can spell it
                    row = next(i for i, text in enumerate(batch) if text and not _is_unicode(text))
                    raise table.error(
                        f"row {rows + row + 1:,} holds half of a surrogate pair, which is not a character; leave it out"
                    ) from error
                rows += len(batch)
            if digest_of(table.path, table.name) != digest:
                raise has_changed(table.name)
        if is_empty:
            raise tables[0].error("there is no text in it: the table has no rows")
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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- JSON -------------------------------------------------------------------------------------------------------------


class JsonTable(Table):
    """JSON lines, an array of objects or strings, or objects one after the other."""

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        has_text: dict[str, bool] = {}
        for _, row in islice(self._rows(), ROWS_LOOKED_AT):
            for column, value in row.items():
                has_text[column] = has_text.get(column, False) or isinstance(value, str)
        of_text = [column for column, is_text in has_text.items() if is_text]
        return list(has_text), of_text, of_text

    def texts(self, column: str) -> Iterator[str | None]:
        for place, row in self._rows():
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise self.error(
                    f"{place}: {column!r} is {_short(text)}, not a string; change it to one, or leave out the row"
                )
            yield text

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place in the file, row). A string in an array is a row with the column `text`."""
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
        """Rows of a file that is not one value for each line: an array, or values over several lines.

        Args:
            number: The line on which `content` begins.
        """
        position = row = 0
        while (position := _SPACE.match(content, position).end()) < len(content):
            try:
                value, position = _DECODER.raw_decode(content, position)
            except ValueError as error:
                line = number + content.count("\n", 0, getattr(error, "pos", position))
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

    def _row(self, place: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{place} is not a JSON object")
        return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise MiniGPTError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
_SPACE = re.compile(r"[ \t\r\n]*")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


# -- CSV --------------------------------------------------------------------------------------------------------------


class CsvTable(Table):
    """Comma-separated values, or tab-separated ones (.tsv), whose first row is the header."""

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        rows = self._rows()
        header = next(rows, [])
        of_text, is_empty = dict.fromkeys(header, False), True
        for row in islice(rows, ROWS_LOOKED_AT):
            is_empty = False
            for column, value in zip(header, row, strict=False):
                of_text[column] = of_text[column] or _is_text(value)
        if is_empty:
            return [], [], []
        self._check_delimiter(header)
        return header, [column for column, is_text in of_text.items() if is_text], header

    def texts(self, column: str) -> Iterator[str | None]:
        rows = self._rows()
        header = next(rows)
        if header.count(column) > 1:
            raise self.error(f"{header.count(column)} columns are named {column!r}; rename all but one")
        place = header.index(column)
        for row in rows:
            yield row[place] if place < len(row) else None

    def describe(self) -> None:
        logger.info("%s: the first row is the header, %s", shown(self.name), ", ".join(map(repr, next(self._rows()))))
        if self._delimiter == "\t":
            with self.lines("") as lines:
                first = islice(lines, ROWS_LOOKED_AT)
                quoted = sum(value.startswith('"') for line in first for value in line.rstrip("\r\n").split("\t"))
            if quoted:  # many programs write TSV files in which quotes are text
                logger.warning(
                    "%s: %s fields of the first %s lines begin with a quote: the quotes around a field are removed, as in "
                    "CSV; if they are part of the text, double them",
                    *(shown(self.name), f"{quoted:,}", f"{ROWS_LOOKED_AT:,}"),
                )

    @property
    def _delimiter(self) -> str:
        return "\t" if ending_of(self.name) == ".tsv" else ","

    def _rows(self) -> Iterator[list[str]]:
        """The fields of each row that is not blank, the header first."""
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
                            f"{len(header)}; put text that has a {'comma' if self._delimiter == ',' else 'tab'} in it in "
                            "quotes"
                        )
                    if row:
                        yield row
            except csv.Error as error:
                raise self.error(f"line {reader.line_num:,}: {error}") from error

    def _check_delimiter(self, header: list[str]) -> None:
        """Refuse a table whose header is a single field with another delimiter in it: all columns would be read as one."""
        for delimiter, plural in OTHER_DELIMITERS.items():
            if len(header) == 1 and delimiter in header[0]:
                raise self.error(
                    f"its only column is {header[0]!r}, so its fields seem to be separated by {plural}; convert the file to "
                    "commas (.csv) or tabs (.tsv), or read it as text: --data_format text"
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
        of_text = [field.name for field in schema if _is_string(field.type)]
        return schema.names, of_text, of_text

    def texts(self, column: str) -> Iterator[str | None]:
        with self._opened() as source:
            kind = self._schema(source).field(column).type
            if not _is_string(kind):
                raise self.error(f"the column {column!r} holds values of type {kind}, not text")
            for batch in self._values(source, column):
                yield from batch.to_pylist()

    def _schema(self, source: pa.NativeFile) -> pa.Schema:
        return _ipc_reader(source).schema

    def _values(self, source: pa.NativeFile, column: str) -> Iterator[pa.Array]:
        reader = _ipc_reader(source)
        if isinstance(reader, pa.RecordBatchFileReader):
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            yield batch.column(column)

    @contextmanager
    def _opened(self) -> Iterator[pa.NativeFile]:
        """The file; a compressed one is unpacked, since its parts are read in any order."""
        try:
            if packing_of(self.name):
                with tempfile.TemporaryFile() as unpacked:
                    for chunk in chunks(self.path, self.name, 1 << 20):
                        unpacked.write(chunk)
                    yield pa.PythonFile(unpacked)
            else:
                with pa.OSFile(self.path) as source:
                    yield source
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


class ParquetTable(ArrowTable):
    def _schema(self, source: pa.NativeFile) -> pa.Schema:
        return pq.ParquetFile(source).schema_arrow

    def _values(self, source: pa.NativeFile, column: str) -> Iterator[pa.Array]:
        for batch in pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=[column]):
            yield batch.column(0)


def _ipc_reader(source: pa.NativeFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    source.seek(0)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


FORMATS: dict[str, type[Table]] = {"json": JsonTable, "csv": CsvTable, "parquet": ParquetTable, "arrow": ArrowTable}
