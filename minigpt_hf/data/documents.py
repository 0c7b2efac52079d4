"""Documents in a fixed order, read from disk or from the network on demand.

A document is a text file or a row of a table. `Documents` can be iterated any number of times and yields text in parts of at
most `PART_CHARACTERS` characters, so a corpus may exceed memory. Text files are read in chunks; tables are memory-mapped
`datasets.Dataset`s.
"""

import codecs
import hashlib
import json
import logging
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrays import BLOCK, blocks, selected, stored
from .cache import cached
from .reading import (
    Decoding,
    DecodingStatistics,
    changed_file_error,
    compression_of,
    content_sha256,
    decoded,
    describe_undecodable,
    printable,
    text_chunks,
)

logger = logging.getLogger(__name__)

PART_CHARACTERS = 1_000_000
CACHED_BYTES = 1 << 26  # the index of uncompressed text files is cached if they have at least this size in total
TEXT_INDEX_VERSION = 2  # version of the format of this index
# Minimum number of excerpts in a sample, so that no single passage of a long document dominates a score.
MIN_EXCERPTS = 20

# One entry per document: its row in the table or position in the list of files, the range of characters that is used, and
# the SHA-256 of the UTF-8 encoding of the complete document.
INDEX_DTYPE = np.dtype([("row", "<i8"), ("begin", "<i8"), ("end", "<i8"), ("digest", "V32")])


class Documents(ABC):
    """Documents in a fixed order. Iterating yields each as a `str`."""

    @property
    @abstractmethod
    def characters(self) -> int | None:
        """Total number of characters; None if it is unknown before the documents have been read."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """64 hexadecimal digits that depend only on the content and order of the documents."""

    @abstractmethod
    def parts(self) -> Iterator[tuple[bool, str]]:
        """Yield (whether the part starts a document, text) for each part of each document."""

    @abstractmethod
    def head(self, characters: int) -> "Documents":
        """Return the first `characters` characters; the last document may be truncated."""

    @property
    @abstractmethod
    def number_of_documents(self) -> int | None:
        """Number of documents; None if it is unknown before they have been read."""

    @abstractmethod
    def sample(self, characters: int, window: int) -> "Documents":
        """Return excerpts of all documents, about `characters` characters in total.

        The result is deterministic. Documents that have at most `characters` characters in total are returned unchanged.

        Args:
            window: Length of an evaluation window in characters; excerpts consist of complete windows.
        """

    def evenly_spaced(self, characters: int) -> Iterator[str]:
        """Yield parts with about `characters` characters in total, evenly spaced over the text where the source allows it."""
        return (text for _, text in self.head(characters).parts())

    def position_of(self, character: str) -> str | None:
        """Return where a character occurs first, by reading the text; None if it does not occur."""
        number, characters = -1, 0
        for starts_document, text in self.parts():
            if starts_document:
                number, characters = number + 1, 0
            if (found := text.find(character)) >= 0:
                return self._describe(number, characters + found)
            characters += len(text)
        return None

    def _describe(self, number: int, character: int) -> str:
        """Describe a position for messages.

        Args:
            number: Number of the document, from 0.
            character: Offset in it.
        """
        return f"document {number + 1:,}, character {character + 1:,}"

    def __iter__(self) -> Iterator[str]:
        document: list[str] | None = None
        for starts_document, text in self.parts():
            if starts_document and document is not None:
                yield "".join(document)
            document = [text] if starts_document or document is None else [*document, text]
        if document is not None:
            yield "".join(document)


@dataclass(frozen=True)
class IndexedDocuments(Documents):
    """Documents of known number and length.

    Args:
        source: Where the text is read from.
        index: Entries of `INDEX_DTYPE`, one per document or excerpt; memory-mapped if there are many.
        folder: Folder for temporary files of memory-mapped arrays.
    """

    source: "TableRows | TextFiles"
    index: np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def characters(self) -> int:
        return sum(int((block["end"] - block["begin"]).sum()) for block in blocks(self.index))

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in ("begin", "end", "digest"):
            for block in blocks(self.index):
                digest.update(np.ascontiguousarray(block[name]).tobytes())
        return digest.hexdigest()

    @property
    def keys(self) -> np.ndarray:
        """The first 64 bits of the SHA-256 of each document, uint64; equal for copies."""
        first = (np.ascontiguousarray(block["digest"]).view(">u8")[::4] for block in blocks(self.index))
        return stored(first, len(self.index), np.dtype(np.uint64), self.folder)

    def select(self, positions: np.ndarray) -> "IndexedDocuments":
        """Return some of the documents, given their positions or a boolean mask."""
        return replace(self, index=selected(self.index, positions, self.folder))

    def split(self, characters: int) -> tuple["IndexedDocuments", "IndexedDocuments"]:
        """Return the first `characters` characters and the rest; a document may be divided between both."""
        if characters <= 0:
            return self.select(np.arange(0)), self
        last = before = 0  # index of the divided document, and number of characters before its block
        for block in blocks(self.index):
            ends = before + np.cumsum(block["end"] - block["begin"])
            position = int(np.searchsorted(ends, characters))
            last += position
            if position < len(block):
                break
            before = int(ends[-1])
        else:
            return self, self.select(np.arange(0))
        excess = int(ends[position]) - characters
        divided = self.index[last : last + 1].copy()
        head = chain(blocks(self.index[:last]), [_with(divided, end=divided["end"] - excess)])
        tail = chain([_with(divided, begin=divided["end"] - excess)][: excess > 0], blocks(self.index[last + 1 :]))
        lengths = last + 1, len(self.index) - last - (not excess)
        first, second = (
            replace(self, index=stored(parts, length, INDEX_DTYPE, self.folder))
            for parts, length in zip((head, tail), lengths, strict=True)
        )
        return first, second

    def head(self, characters: int) -> "IndexedDocuments":
        return self.split(characters)[0]

    @property
    def number_of_documents(self) -> int:
        is_used = np.zeros(1 + max((int(block["row"].max()) for block in blocks(self.index)), default=-1), dtype=bool)
        for block in blocks(self.index):
            is_used[block["row"]] = True
        return int(np.count_nonzero(is_used))

    def sample(self, characters: int, window: int) -> "IndexedDocuments":
        """Take the same share of every document, rounded to complete windows.

        The rounding error is carried over to the next document, so the total is exact and short documents, which are taken
        entirely or not at all, are represented in proportion. A long document is divided into equal sections and
        contributes one excerpt at a pseudo-random position in each.
        """
        if self.characters <= characters:
            return self
        lengths = self.index["end"] - self.index["begin"]
        units = np.minimum(lengths, window)
        due = np.floor(np.cumsum(lengths * (characters / self.characters) / units) + 0.5).astype(np.int64)
        windows = np.minimum(np.diff(due, prepend=0), lengths // units)
        if not windows.any():  # less than half a window was requested, and one window is the minimum that can be scored
            windows[np.argmax(lengths)] = 1
        windows_per_excerpt = max(1, characters // MIN_EXCERPTS // window)
        excerpts = []
        for position in np.flatnonzero(windows):
            document, count, unit = self.index[position], int(windows[position]), int(units[position])
            sections = -(-count // windows_per_excerpt)
            omitted = int(lengths[position]) - count * unit  # characters
            offsets = random.Random(document["digest"].tobytes())
            begin = int(document["begin"])
            for section in range(sections):
                size = (count * (section + 1) // sections - count * section // sections) * unit
                gap = omitted * (section + 1) // sections - omitted * section // sections
                excerpt = document.copy()
                excerpt["begin"] = begin + offsets.randrange(gap + 1)
                excerpt["end"] = excerpt["begin"] + size
                excerpts.append(excerpt)
                begin += gap + size
        return replace(self, index=np.array(excerpts, dtype=INDEX_DTYPE))

    def parts(self) -> Iterator[tuple[bool, str]]:
        return self.source.parts(self.index, 1)

    def _describe(self, number: int, character: int) -> str:
        entry = self.index[number]
        return f"{self.source.describe(int(entry['row']))}, character {int(entry['begin']) + character + 1:,}"

    def evenly_spaced(self, characters: int) -> Iterator[str]:
        return (text for _, text in self.source.parts(self.index, max(1, -(-self.characters // characters))))


def document_batches(index: np.ndarray) -> Iterator[np.ndarray]:
    """Divide an index into batches of at most `PART_CHARACTERS` characters, or of one longer document."""
    position, size = 0, BLOCK
    while position < len(index):
        block = np.asarray(index[position : position + size])  # iterating a `memmap` is slow
        ends = np.cumsum(block["end"] - block["begin"])
        start = before = 0
        while start < len(block):
            stop = max(start + 1, int(np.searchsorted(ends, before + PART_CHARACTERS, side="right")))
            if stop == len(block) and position + stop < len(index):
                break  # this batch may continue in the next block
            yield block[start:stop]
            start, before = stop, int(ends[stop - 1])
        position += start
        size = size if start else 2 * size


def _with(entry: np.ndarray, **values: np.ndarray) -> np.ndarray:
    """Return a copy of an entry of an index with other values."""
    entry = entry.copy()
    for name, value in values.items():
        entry[name] = value
    return entry


def without_empty(documents: IndexedDocuments, kind: str) -> IndexedDocuments:
    """Remove documents without text, and log their number."""
    has_text = np.concatenate([np.empty(0, bool), *(block["end"] > 0 for block in blocks(documents.index))])
    if not (empty := len(has_text) - int(np.count_nonzero(has_text))):
        return documents
    logger.info("%s of %s %s have no text and are skipped", f"{empty:,}", f"{len(has_text):,}", kind)
    return documents.select(has_text)


# -- rows of a table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableRows:
    """A memory-mapped dataset with a column `text`; each row is a document.

    Args:
        start: Number of the rows of the table that precede them, if they are a share of it.
    """

    rows: datasets.Dataset
    start: int = 0

    def parts(self, index: np.ndarray, every: int) -> Iterator[tuple[bool, str]]:
        """Yield the parts of the documents.

        Args:
            every: Read only the first of every `every` batches of documents.
        """
        table = self.rows.with_format("arrow")
        for batch in islice(document_batches(index), 0, None, every):
            rows = batch["row"]
            first, last = int(rows.min()), int(rows.max())
            if last - first < 2 * len(rows):  # reading a range is faster than reading single rows
                column = table[first : last + 1]["text"].take(pa.array(rows - first))
            else:
                column = table[rows]["text"]
            for begin, end, text in zip(
                batch["begin"].tolist(), batch["end"].tolist(), column.to_pylist(), strict=True
            ):
                for start in range(begin, end, PART_CHARACTERS):
                    yield start == begin, text[start : min(start + PART_CHARACTERS, end)]

    def describe(self, row: int) -> str:
        """Describe a document for messages."""
        return f"row {self.start + row + 1:,}"

    def documents(self, cache_dir: Path) -> IndexedDocuments:
        """Index all rows; those without text are omitted."""
        return without_empty(IndexedDocuments(self, _cached_index(self.rows, cache_dir), cache_dir), "rows")


def _write_index(file: Path, rows: datasets.Dataset) -> None:
    if not len(rows):  # an empty file cannot be mapped
        np.save(file, np.zeros(0, INDEX_DTYPE))
        return
    index = np.lib.format.open_memmap(file, "w+", INDEX_DTYPE, (len(rows),))
    position = 0
    for table in rows.with_format("arrow").iter(10_000):
        column = table["text"]
        digests = [hashlib.sha256(text.as_buffer()).digest() if text.is_valid else bytes(32) for text in column]
        block = index[position : position + len(column)]
        block["row"] = np.arange(position, position + len(column))
        block["end"] = pc.fill_null(pc.utf8_length(column), 0).to_numpy()
        block["digest"] = np.frombuffer(b"".join(digests), dtype="V32")
        position += len(column)
    index.flush()


def rows_sha256(rows: datasets.Dataset) -> str:
    """Return a hash of the files of a dataset, and of what it selects from them."""
    digest = hashlib.sha256(f"{rows._fingerprint} {rows.num_rows} {rows.column_names}".encode())
    for file in rows.cache_files:
        digest.update(content_sha256(file["filename"], file["filename"]).encode())
    return digest.hexdigest()


def _cached_index(rows: datasets.Dataset, cache_dir: Path) -> np.ndarray:
    """Return the index of a dataset from the cache, since hashing many rows is slow."""
    return cached(
        cache_dir / "documents" / rows_sha256(rows)[:32],
        lambda folder: _write_index(folder / "index.npy", rows),
        lambda folder: np.load(folder / "index.npy", mmap_mode="r" if len(rows) else None),
        cache_dir,
        "index of documents",
    )


# -- text files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles:
    """Text files, each of which is a document.

    Args:
        paths: The files.
        names: Names to display instead of paths, e.g. the URL of a downloaded file.
    """

    paths: tuple[str, ...]
    decoding: Decoding
    names: dict[str, str] = field(default_factory=dict)

    def parts(self, index: np.ndarray, every: int) -> Iterator[tuple[bool, str]]:
        """Yield the parts of the documents.

        Args:
            every: Read only the first of every `every` batches of documents, or parts of a document longer than a batch.

        Raises:
            UnreadableFileError: if the content of a file no longer has the hash in the index.
        """
        number = 0  # index of the batch, or of the part of a long document
        for batch in document_batches(index):
            is_long = len(batch) == 1 and batch["end"][0] - batch["begin"][0] > PART_CHARACTERS
            if is_long or number % every == 0:
                last = None
                for document, text in self._read_excerpts(batch):
                    if number % every == 0:
                        yield document != last, text
                        last = document
                    number += is_long
            number += not is_long

    def _read_excerpts(self, batch: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield (position in the batch, text) of each part. Files are read completely, to verify their hashes."""
        entries = zip(range(len(batch)), *(batch[name].tolist() for name in ("row", "begin", "end")), strict=True)
        for row, group in groupby(entries, key=itemgetter(1)):
            excerpts, path, digest, position = list(group), self.paths[row], hashlib.sha256(), 0
            for text in text_chunks(path, self.name(path), self.decoding, PART_CHARACTERS, digest):
                for number, _, begin, end in excerpts:
                    if found := text[max(begin - position, 0) : max(end - position, 0)]:
                        yield number, found
                position += len(text)
            if digest.digest() != batch["digest"][excerpts[0][0]].tobytes():
                raise changed_file_error(self.name(path))

    def documents(self, cache_dir: Path) -> IndexedDocuments:
        """Index all files; those without text are omitted.

        The index of large files is cached under the SHA-256 of their content, because hashing is faster than decoding.

        Raises:
            UnreadableFileError: if a file cannot be decoded; see `reading`.
        """
        if any(compression_of(self.name(path)) for path in self.paths) or self._size < CACHED_BYTES:
            index, statistics = self._indexed()
        else:
            digests = [content_sha256(path, self.name(path)) for path in self.paths]
            content = json.dumps([TEXT_INDEX_VERSION, asdict(self.decoding), digests])
            index, statistics = cached(
                cache_dir / "documents" / hashlib.sha256(content.encode()).hexdigest()[:32],
                lambda folder: self._write_index(folder, digests),
                _read_text_index,
                cache_dir,
                "index of text files",
            )
        self._report(statistics)
        return without_empty(IndexedDocuments(self, index), "files")

    @property
    def _size(self) -> int:
        """Total size of the files in bytes; 0 for those that cannot be read, which is reported when they are opened."""
        return sum(os.path.getsize(path) for path in self.paths if os.path.exists(path))  # noqa: PTH110, PTH202 (fast)

    def _indexed(self) -> tuple[np.ndarray, list[DecodingStatistics]]:
        index, statistics = np.zeros(len(self.paths), dtype=INDEX_DTYPE), []
        for position, path in enumerate(self.paths):
            statistics.append(DecodingStatistics())
            digest, length = hashlib.sha256(), 0
            for text in decoded(path, self.name(path), self.decoding, PART_CHARACTERS, statistics[-1], digest):
                length += len(text)
            index[position] = (position, 0, length, digest.digest())
        return index, statistics

    def _write_index(self, folder: Path, digests: list[str]) -> None:
        index, statistics = self._indexed()
        for path, digest, entry in zip(self.paths, digests, index, strict=True):
            is_same = entry["digest"].tobytes().hex() == digest if self.decoding.preserves_bytes else None
            if not (content_sha256(path, self.name(path)) == digest if is_same is None else is_same):
                raise changed_file_error(self.name(path))
        np.save(folder / "index.npy", index)
        (folder / "statistics.json").write_text(json.dumps([asdict(one) for one in statistics]), encoding="utf-8")

    def describe(self, row: int) -> str:
        """Describe a document for messages."""
        return printable(self.name(self.paths[row]))

    def name(self, path: str) -> str:
        return self.names.get(path, path)

    def _report(self, statistics: list[DecodingStatistics]) -> None:
        """Log byte order marks, zero characters, converted line endings and undecodable bytes."""
        with_mark = [path for path, one in zip(self.paths, statistics, strict=True) if one.byte_order_mark]
        if with_mark:
            without_mark = {"utf-8": "utf-8-sig", "utf-16-le": "utf-16", "utf-16-be": "utf-16"}
            name = without_mark.get(codecs.lookup(self.decoding.encoding).name, "utf-8-sig")
            logger.warning(
                "%s with a byte order mark, which is read as the character U+FEFF; --encoding %s removes it",
                self._subject(with_mark, "begins", "begin"),
                name,
            )
        with_zeros = [path for path, one in zip(self.paths, statistics, strict=True) if one.zeros]
        if with_zeros:
            logger.warning(
                "%s zero characters (U+0000), so the data may be UTF-16 (use --encoding utf-16) or binary",
                self._subject(with_zeros, "contains", "contain"),
            )
        undecodable = [path for path, one in zip(self.paths, statistics, strict=True) if one.undecodable]
        if undecodable:
            number = sum(one.undecodable for one in statistics)
            subject = self._subject(undecodable, "contains", "contain")
            logger.warning("%s %s", subject, describe_undecodable(self.decoding, number))
        if self.decoding.newline == "universal":
            logger.info(
                "converted %s line endings (CRLF, CR) to LF", f"{sum(one.newlines_converted for one in statistics):,}"
            )

    def _subject(self, paths: list[str], singular_verb: str, plural_verb: str) -> str:
        first = printable(self.name(paths[0]))
        return f"{first} {singular_verb}" if len(paths) == 1 else f"{len(paths):,} files ({first}, …) {plural_verb}"


def _read_text_index(folder: Path) -> tuple[np.ndarray, list[DecodingStatistics]]:
    statistics = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
    return np.load(folder / "index.npy"), [DecodingStatistics(**one) for one in statistics]


# -- streams and mixtures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamedDocuments(Documents):
    """Documents that are read from the network on every iteration and not stored.

    Args:
        rows: Rows with a column `text`.
        identity: Identifies the content, e.g. name and revision of a dataset.
        low: A document belongs to this split if its SHA-256, scaled to [0, 1), is in [`low`, `high`).
        high: See `low`.
        max_characters: Limit for all documents together.
        max_document_characters: Limit for each document.
    """

    rows: datasets.IterableDataset
    identity: str
    low: float = 0.0
    high: float = 1.0
    max_characters: int | None = None
    max_document_characters: int | None = None

    @property
    def characters(self) -> None:
        return None

    @property
    def number_of_documents(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        limits = f"{self.low} {self.high} {self.max_characters} {self.max_document_characters}"
        return hashlib.sha256(f"{self.identity} {limits}".encode()).hexdigest()

    def head(self, characters: int) -> "StreamedDocuments":
        return replace(self, max_characters=characters)

    def sample(self, characters: int, window: int) -> "StreamedDocuments":
        """Take the beginnings of the first documents, because the total length of a stream is unknown."""
        windows_per_excerpt = max(1, characters // MIN_EXCERPTS // window)
        return replace(self, max_characters=characters, max_document_characters=windows_per_excerpt * window)

    def parts(self) -> Iterator[tuple[bool, str]]:
        remaining = self.max_characters
        for row in self.rows:
            text = row["text"] or ""
            share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
            if not text or not self.low <= share < self.high:
                continue
            text = text[: self.max_document_characters]
            yield True, text[:remaining]
            if remaining is not None and (remaining := remaining - len(text)) <= 0:
                return


@dataclass(frozen=True)
class Mixture(Documents):
    """Several sources in given shares of characters. No document is repeated; the mixture ends with the first exhausted one.

    Args:
        components: The sources.
        shares: Share of each source; they sum to 1.
    """

    components: Sequence[Documents]
    shares: Sequence[float]

    @classmethod
    def of(cls, components: Sequence[Documents], shares: Sequence[float]) -> "Mixture":
        """Create a mixture; sources of known length are truncated so that their shares are exact."""
        sizes = _all_known(component.characters for component in components)
        if sizes is not None:
            total = min(size / share for size, share in zip(sizes, shares, strict=True))
            components = [one.head(round(total * share)) for one, share in zip(components, shares, strict=True)]
        return cls(components, shares)

    @classmethod
    def joined(cls, components: Sequence[Documents]) -> "Mixture":
        """Concatenate sources of known length."""
        sizes = _all_known(component.characters for component in components)
        assert sizes is not None, "the length of a stream is unknown"
        total = sum(sizes)
        return cls(components, [size / total for size in sizes])

    @property
    def characters(self) -> int | None:
        sizes = _all_known(component.characters for component in self.components)
        return None if sizes is None else sum(sizes)

    @property
    def fingerprint(self) -> str:
        parts = [component.fingerprint for component in self.components]
        if self.characters is None:  # the shares determine how streams are interleaved
            parts.append(" ".join(map(str, self.shares)))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def number_of_documents(self) -> int | None:
        numbers = _all_known(component.number_of_documents for component in self.components)
        return None if numbers is None else sum(numbers)

    def position_of(self, character: str) -> str | None:
        if self.characters is None:  # interleaved
            return super().position_of(character)
        return next(filter(None, (component.position_of(character) for component in self.components)), None)

    def sample(self, characters: int, window: int) -> "Mixture":
        samples = [
            component.sample(round(characters * share), window)
            for component, share in zip(self.components, self.shares, strict=True)
        ]
        return replace(self, components=samples)

    def head(self, characters: int) -> "Mixture":
        heads = [
            component.head(round(characters * share))
            for component, share in zip(self.components, self.shares, strict=True)
        ]
        return replace(self, components=heads)

    def parts(self) -> Iterator[tuple[bool, str]]:
        """Yield one source after the other. Streams are interleaved: next comes the one furthest below its share."""
        if self.characters is not None:
            yield from chain.from_iterable(component.parts() for component in self.components)
            return
        streams, taken = [iter(component) for component in self.components], [0] * len(self.components)
        while True:
            behind = min(range(len(streams)), key=lambda i: taken[i] / self.shares[i])
            document = next(streams[behind], None)
            if document is None:
                return
            taken[behind] += len(document)
            yield True, document


def _all_known(counts: Iterable[int | None]) -> list[int] | None:
    """Return the counts, or None if one of them is unknown."""
    known: list[int] = []
    for count in counts:
        if count is None:
            return None
        known.append(count)
    return known
