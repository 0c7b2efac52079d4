"""Files of tables -> a `datasets.Dataset` with the column `text`, found again by the content of the files.

In: files of one format. Out: the column that holds the text, verbatim: a CSV field is never taken for a number or a missing
value. Raises `ValueError` for a table whose text column is missing or ambiguous, and for one that is damaged.

`datasets` takes the names it is given for patterns and identifies a file by path and modification time. So its builders get
`DataFilesList`s, which hold literal paths and, in place of the time, the SHA-256 of the content.
"""

import codecs
import csv
import hashlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from .files import ending_of
from .reading import (
    BYTE_ORDER_MARK,
    Decoding,
    UnreadableFile,
    chunks,
    decoded,
    digest_of,
    has_changed,
    keep,
    open_bytes,
    packing_of,
    shown,
)

logger = logging.getLogger(__name__)

BUILDERS = {"json": Json, "parquet": Parquet, "arrow": Arrow}
CHUNK = 1 << 20
# A column is taken for text if one of its first values is neither a number, nor a truth value, nor one of these.
ROWS_LOOKED_AT = 1_000
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
NOT_TEXT = {"", "na", "n/a", "nan", "null", "none", "true", "false"}


def read_tables(
    builder: str, paths: list[str], names: dict[str, str], decoding: Decoding, cache_dir: Path
) -> datasets.Dataset:
    """All rows and columns of tables in a format of `BUILDERS`."""
    before = [Path(path).stat() for path in paths]
    sources = [_as_datasets_reads(builder, path, names.get(path, path), decoding, cache_dir) for path in paths]
    found = DataFilesDict({"train": DataFilesList([path for path, _ in sources], [(digest,) for _, digest in sources])})
    reader = BUILDERS[builder](data_files=found)
    try:
        reader.download_and_prepare()
    except DatasetGenerationError as error:
        if builder == "json":
            for path in paths:
                if (fault := _broken_line(path, names.get(path, path), decoding)) is not None:
                    raise UnreadableFile(f"{shown(names.get(path, path))}: {fault}") from error
        raise
    if not reader.info.splits["train"].num_examples:
        raise UnreadableFile(f"{shown(names.get(paths[0], paths[0]))}: there is no text in it: the table has no rows")
    rows = reader.as_dataset(split="train")
    for path, stat in zip(paths, before, strict=True):
        after = Path(path).stat()
        if (after.st_size, after.st_mtime_ns, after.st_ctime_ns) != (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns):
            shutil.rmtree(reader.cache_dir)
            raise has_changed(names.get(path, path))
    return rows


def _broken_line(path: str, name: str, decoding: Decoding) -> str | None:
    """Which line of a file of JSON lines is not JSON; `None` if each is, or if it is one value over several lines."""
    with open_bytes(path, name) as file:
        lines = enumerate(io.TextIOWrapper(file, decoding.encoding, decoding.errors), start=1)
        for number, line in lines:
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if number == 1 and line.strip() in ("[", "{"):
                return None
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number:,} is not a JSON object"
            except ValueError as error:
                return f"line {number:,} is not JSON: {error}"
            except RecursionError:
                return f"line {number:,} is nested too deeply"
    return None


def _as_datasets_reads(builder: str, path: str, name: str, decoding: Decoding, cache_dir: Path) -> tuple[str, str]:
    """A file that `datasets` can read as it stands, and the SHA-256 of its content.

    The file itself, or a copy in the cache: of a compressed file, of JSON in another encoding, or under a name without
    `::`, which `datasets` takes for a chain of protocols.
    """
    is_text = builder == "json"
    is_utf8 = codecs.lookup(decoding.encoding).name == "utf-8" and decoding.errors == "strict"
    is_copied = packing_of(name) != "" or "::" in path or (is_text and not is_utf8)
    preserving = replace(decoding, newline="preserve")

    def content() -> Iterator[bytes]:
        if is_text:  # this also verifies that it is text, which the builder does not
            return (text.encode() for text in decoded(path, name, preserving, CHUNK))
        return chunks(path, name, CHUNK)

    if is_copied:
        kept, digest = keep(content(), cache_dir / "tables", f".{builder}")
        return str(kept), digest
    digest = hashlib.sha256()
    for data in content():
        digest.update(data)
    return str(Path(path).absolute()), digest.hexdigest()


# -- csv --------------------------------------------------------------------------------------------------------------


def read_csv(paths: list[str], names: dict[str, str], decoding: Decoding, choose_column: Callable) -> datasets.Dataset:
    """The text column of tables in CSV or TSV, each field as it stands.

    Args:
        choose_column: From the names of all columns, and of those that are taken for text, to the name of one.
    """
    decoding = replace(decoding, newline="preserve")
    columns, columns_of, has_rows = {}, [], False
    for path in paths:
        name = names.get(path, path)
        header, of_text, number = _columns(path, name, decoding)
        _check_delimiter(name, header)
        columns_of.append(header)
        has_rows = has_rows or number > 0
        columns.setdefault(choose_column(header, of_text), name)
        if header.count(column := next(reversed(columns))) > 1:
            raise UnreadableFile(
                f"{shown(name)}: {header.count(column)} columns are named {column!r}; rename all but one"
            )
    if len(columns) > 1:
        texts = ", ".join(f"{column!r} in {shown(name)}" for column, name in columns.items())
        raise UnreadableFile(f"the text is in different columns, {texts}; say which: --text_column")
    if not has_rows:
        raise UnreadableFile(f"{shown(names.get(paths[0], paths[0]))}: there is no text in it: the table has no rows")
    first = shown(names.get(paths[0], paths[0]))
    logger.info("%s: the first row is the header, %s", first, ", ".join(map(repr, columns_of[0])))
    _warn_of_quotes(paths, names, decoding)
    kwargs = {
        "paths": tuple(str(Path(path).absolute()) for path in paths),
        "names": tuple(names.get(path, path) for path in paths),
        "digests": tuple(digest_of(path, names.get(path, path)) for path in paths),
        "column": next(iter(columns)),
        "decoding": decoding,
    }
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=kwargs)


def _rows(paths: tuple[str], names: tuple[str], digests: tuple[str], column: str, decoding: Decoding) -> Iterator[dict]:
    for path, name, digest in zip(paths, names, digests, strict=True):
        rows = _fields(path, name, decoding)
        header = next(rows)[1]
        place = header.index(column)
        for _, row in rows:
            yield {"text": row[place] if place < len(row) else None}
        if digest_of(path, name) != digest:
            raise has_changed(name)


def _columns(path: str, name: str, decoding: Decoding) -> tuple[list[str], list[str], int]:
    """The header, which of its columns are taken for text, and how many rows that was decided by."""
    rows = _fields(path, name, decoding)
    _, header = next(rows, (0, []))
    of_text, number = dict.fromkeys(header, False), 0
    for _, row in islice(rows, ROWS_LOOKED_AT):
        number += 1
        for column, value in zip(header, row, strict=False):
            of_text[column] = of_text[column] or _is_text(value)
    return header, [column for column, is_text in of_text.items() if is_text], number


def _check_delimiter(name: str, header: list[str]) -> None:
    """Refuse a table whose header is a single field that contains another delimiter.

    Raises:
        UnreadableFile: all columns would be read as one.
    """
    if len(header) == 1:
        for delimiter, plural in OTHER_DELIMITERS.items():
            if delimiter in header[0]:
                raise UnreadableFile(
                    f"{shown(name)}: its only column is {header[0]!r}, so its fields seem to be separated by {plural}; "
                    "convert the file to commas (.csv) or tabs (.tsv), or read it as text: --data_format text"
                )


def _warn_of_quotes(paths: list[str], names: dict[str, str], decoding: Decoding) -> None:
    """Report TSV files in which fields are enclosed in quotes: many programs write TSV in which quotes are text."""
    for path in paths:
        name = names.get(path, path)
        if ending_of(name) != ".tsv":
            continue
        with open_bytes(path, name) as file:
            lines = islice(io.TextIOWrapper(file, decoding.encoding, decoding.errors), ROWS_LOOKED_AT)
            quoted = sum(field.startswith('"') for line in lines for field in line.rstrip("\r\n").split("\t"))
        if quoted:
            logger.warning(
                "%s: %s fields of the first %s lines begin with a quote: the quotes around a field are removed, as in CSV; "
                "if they are part of the text, double them",
                shown(name),
                f"{quoted:,}",
                f"{ROWS_LOOKED_AT:,}",
            )


def _is_text(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value.strip().lower() not in NOT_TEXT
    return False


def _fields(path: str, name: str, decoding: Decoding) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, fields) of each row."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ending_of(name) == ".tsv" else ","
    header = None
    with open_bytes(path, name) as file:
        text = io.TextIOWrapper(file, decoding.encoding, decoding.errors, newline="")
        reader = csv.reader(_without_mark(text), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                header = header or row
                if len(row) > len(header) and any(row[len(header) :]):
                    raise UnreadableFile(
                        f"{shown(name)}: the row that ends on line {reader.line_num:,} has {len(row)} fields and the header "
                        f"{len(header)}; put text that has a {'tab' if delimiter == chr(9) else 'comma'} in it in quotes"
                    )
                if row:  # else a blank line
                    yield reader.line_num, row
        except csv.Error as error:
            raise UnreadableFile(f"{shown(name)}: line {reader.line_num:,}: {error}") from error
        except UnicodeDecodeError:
            for _ in decoded(path, name, decoding, CHUNK):  # names the byte and its position
                pass
            raise


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    """Of a table, a byte order mark is no part: it would be one of the name of its first column."""
    first = next(lines, "")
    yield first.removeprefix(BYTE_ORDER_MARK)
    yield from lines
