"""Documents, in order, read from disk or from the network as they are needed.

A document is a text that stands for itself: a file, or a row of a table. Out: `Texts`, which hand out their documents any
number of times, in parts of about a million characters, so that a corpus may be larger than memory. They refuse nothing:
what is no text has been refused by `sources`.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .cache import cached

PART_CHARACTERS = 1_000_000
# A sample consists of at least this many excerpts, so that no single passage of a long document decides a score.
EXCERPTS = 20

# Where a document stands: its first row and number of rows, which characters of it are meant, and the hash of all of it.
INDEX = np.dtype([("row", "<i8"), ("rows", "<i8"), ("begin", "<i8"), ("end", "<i8"), ("digest", "V32")])


class Texts(ABC):
    """Documents in a fixed order. Iterating yields each as a `str`."""

    @property
    @abstractmethod
    def characters(self) -> int | None:
        """How long all of it is, if that is known before it has been read."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """64 hex digits: the same texts have the same on any machine."""

    @abstractmethod
    def parts(self) -> Iterator[tuple[bool, str]]:
        """(does it open a document?, text) for each part of each document."""

    @abstractmethod
    def head(self, characters: int) -> "Texts":
        """The first so many characters, which may cut the last document short."""

    @property
    @abstractmethod
    def number_of_documents(self) -> int | None:
        """How many documents the text consists of, if that is known before it has been read."""

    @abstractmethod
    def sample(self, characters: int, window: int) -> "Texts":
        """About `characters` characters from all documents, in excerpts of whole windows of `window` characters.

        The choice is deterministic: it depends on the documents and the arguments only. A text that is not longer than
        `characters` is returned unchanged.
        """

    def evenly(self, characters: int) -> Iterator[str]:
        """About so many characters, from all over the text if that can be done without reading all of it."""
        return (text for _, text in self.head(characters).parts())

    def __iter__(self) -> Iterator[str]:
        document: list[str] | None = None
        for opens, text in self.parts():
            if opens and document is not None:
                yield "".join(document)
            document = [text] if opens or document is None else [*document, text]
        if document is not None:
            yield "".join(document)


@dataclass(frozen=True)
class Documents(Texts):
    """Rows of a memory-mapped dataset with the column `text`; `index` [number of documents] says which."""

    rows: datasets.Dataset
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def characters(self) -> int:
        return int((self.index["end"] - self.index["begin"]).sum())

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in ("begin", "end", "digest"):
            digest.update(np.ascontiguousarray(self.index[name]).tobytes())
        return digest.hexdigest()

    @property
    def keys(self) -> np.ndarray:
        """The first 64 bits of each document's hash: copies have the same."""
        return np.ascontiguousarray(self.index["digest"]).view(">u8").reshape(-1, 4)[:, 0]

    def select(self, places: np.ndarray) -> "Documents":
        """Some of the documents, by place or by mask."""
        return replace(self, index=self.index[places])

    def cut(self, characters: int) -> tuple["Documents", "Documents"]:
        """The first so many characters, and the rest; a document may be cut in two."""
        ends = np.cumsum(self.index["end"] - self.index["begin"])
        last = int(np.searchsorted(ends, characters))
        if last == len(ends):
            return self, self.select(np.arange(0))
        head, tail = self.index[: last + 1].copy(), self.index[last:].copy()
        beyond = int(ends[last]) - characters
        head["end"][-1] -= beyond
        tail["begin"][0] = head["end"][-1]
        return replace(self, index=head), replace(self, index=tail if beyond else tail[1:])

    def head(self, characters: int) -> "Documents":
        return self.cut(characters)[0]

    @property
    def number_of_documents(self) -> int:
        return len(np.unique(self.index["row"]))

    def sample(self, characters: int, window: int) -> "Documents":
        """Every document contributes the same share of its length, rounded to whole windows.

        The rounding carries over from one document to the next, so that the total is right and short documents, which
        are taken whole or not at all, are represented in proportion. A long document contributes several excerpts, one
        at a pseudo-random place in each of as many equal sections.
        """
        if self.characters <= characters:
            return self
        lengths = self.index["end"] - self.index["begin"]
        units = np.minimum(lengths, window)
        due = np.floor(np.cumsum(lengths * (characters / self.characters) / units) + 0.5).astype(np.int64)
        windows = np.minimum(np.diff(due, prepend=0), lengths // units)
        if not windows.any():  # fewer characters than half a window: one window is the least that can be scored
            windows[np.argmax(lengths)] = 1
        windows_in_an_excerpt = max(1, characters // EXCERPTS // window)
        excerpts = []
        for place in np.flatnonzero(windows):
            document, count, unit = self.index[place], int(windows[place]), int(units[place])
            sections = -(-count // windows_in_an_excerpt)
            gaps = int(lengths[place]) - count * unit  # characters that are left out
            offsets = random.Random(document["digest"].tobytes())
            begin = int(document["begin"])
            for section in range(sections):
                size = (count * (section + 1) // sections - count * section // sections) * unit
                gap = gaps * (section + 1) // sections - gaps * section // sections
                excerpt = document.copy()
                excerpt["begin"] = begin + offsets.randrange(gap + 1)
                excerpt["end"] = excerpt["begin"] + size
                excerpts.append(excerpt)
                begin += gap + size
        return replace(self, index=np.array(excerpts, dtype=INDEX))

    def parts(self) -> Iterator[tuple[bool, str]]:
        return chain.from_iterable(self._batches())

    def evenly(self, characters: int) -> Iterator[str]:
        every = -(-self.characters // characters)
        return (text for batch in self._batches(every) for _, text in batch)

    def _batches(self, every: int = 1) -> Iterator[list[tuple[bool, str]]]:
        """The parts, in batches of about `PART_CHARACTERS`: every first, second, third … of them."""
        table, place, number = self.rows.with_format("arrow"), 0, 0
        # Bounds of batches: runs of short documents of one row each, or a document alone.
        lengths = self.index["end"] - self.index["begin"]
        while place < len(self.index):
            if self.index["rows"][place] > 1:
                for opens, lines, kept in self._slices(table, self.index[place]):
                    if number % every == 0:
                        yield [(opens, "".join(lines.to_pylist())[kept])]
                    number += 1
                place += 1
                continue
            stop, room = place + 1, PART_CHARACTERS - lengths[place]
            while stop < len(self.index) and self.index["rows"][stop] == 1 and lengths[stop] <= room:
                room -= lengths[stop]
                stop += 1
            if number % every == 0:
                few = self.index[place:stop]
                texts = table[few["row"]]["text"].to_pylist()
                yield [(True, text[one["begin"] : one["end"]]) for one, text in zip(few, texts, strict=True)]
            number += 1
            place = stop

    @staticmethod
    def _slices(table: datasets.Dataset, one: np.void) -> Iterator[tuple[bool, pa.ChunkedArray, slice]]:
        """(is it the first?, lines, which characters of them): a document of many rows, some rows at a time."""
        row, rows, begin, end = (int(one[name]) for name in ("row", "rows", "begin", "end"))
        step = max(1, int(rows * PART_CHARACTERS / max(end, 1)))
        position = 0
        for first in range(row, row + rows, step):
            lines = table[first : min(first + step, row + rows)]["text"]
            size = pc.sum(pc.utf8_length(lines)).as_py() or 0
            if position < end and position + size > begin:
                yield position <= begin, lines, slice(max(begin - position, 0), end - position)
            position += size


def rows_as_documents(rows: datasets.Dataset) -> np.ndarray:
    """The index of a dataset each of whose rows is a document; empty ones are left out."""
    digests, lengths = [], []
    for table in rows.with_format("arrow").iter(10_000):
        column = table["text"]
        lengths.append(pc.fill_null(pc.utf8_length(column), 0).to_numpy())
        digests += [hashlib.sha256(text.as_buffer()).digest() if text.is_valid else bytes(32) for text in column]
    index = np.zeros(len(rows), dtype=INDEX)
    index["row"], index["rows"] = np.arange(len(rows)), 1
    index["end"] = np.concatenate(lengths) if lengths else 0
    index["digest"] = np.frombuffer(b"".join(digests), dtype="V32")
    return index[index["end"] > 0]


def rows_as_one_document(rows: datasets.Dataset) -> np.ndarray:
    """The index of a dataset whose rows are the lines of a single document."""
    digest, length = hashlib.sha256(), 0
    for table in rows.with_format("arrow").iter(100_000):
        for chunk in table["text"].chunks:
            length += pc.sum(pc.utf8_length(chunk)).as_py()
            digest.update(_bytes_of(chunk))
    index = np.zeros(1, dtype=INDEX)
    index["rows"], index["end"], index["digest"] = len(rows), length, np.void(digest.digest())
    return index[index["end"] > 0]


def _bytes_of(lines: pa.StringArray) -> memoryview:
    """The UTF-8 of an array of strings, one after the other: Arrow keeps them so."""
    _, offsets, data = lines.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[[lines.offset, lines.offset + len(lines)]]
    return memoryview(data)[bounds[0] : bounds[1]]


def index_kept(rows: datasets.Dataset, make, cache_dir: Path) -> np.ndarray:
    """`make(rows)`, or what it gave for the same rows before: a gigabyte need not be hashed at each start."""
    # `datasets` names what it loads after the files' paths, sizes and times, or their revision.
    name = hashlib.sha256(f"{rows._fingerprint} {make.__name__}".encode()).hexdigest()[:32]
    return cached(
        cache_dir / "documents" / name,
        lambda folder: np.save(folder / "index.npy", make(rows)),
        lambda folder: np.load(folder / "index.npy"),
        cache_dir,
        "index of documents",
    )


@dataclass(frozen=True)
class StreamedDocuments(Texts):
    """Documents that arrive over the network while they are read, and are never kept.

    Which part of them this is, is decided by their content: those whose hash, as a share of all hashes, lies in
    [`low`, `high`).
    """

    rows: datasets.IterableDataset
    identity: str
    low: float = 0.0
    high: float = 1.0
    most: int | None = None
    most_of_a_document: int | None = None

    @property
    def characters(self) -> None:
        return None

    @property
    def number_of_documents(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        limits = f"{self.low} {self.high} {self.most} {self.most_of_a_document}"
        return hashlib.sha256(f"{self.identity} {limits}".encode()).hexdigest()

    def head(self, characters: int) -> "StreamedDocuments":
        return replace(self, most=characters)

    def sample(self, characters: int, window: int) -> "StreamedDocuments":
        """The beginnings of the first documents: a stream has no length of which each could contribute a share."""
        windows_in_an_excerpt = max(1, characters // EXCERPTS // window)
        return replace(self, most=characters, most_of_a_document=windows_in_an_excerpt * window)

    def parts(self) -> Iterator[tuple[bool, str]]:
        left = self.most
        for row in self.rows:
            text = row["text"] or ""
            share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
            if not text or not self.low <= share < self.high:
                continue
            text = text[: self.most_of_a_document]
            yield True, text[:left]
            if left is not None and (left := left - len(text)) <= 0:
                return


@dataclass(frozen=True)
class Mixture(Texts):
    """Several texts in given shares of characters; none is repeated, and the first that runs out ends it."""

    texts: Sequence[Texts]
    shares: Sequence[float]

    @classmethod
    def of(cls, texts: Sequence[Texts], shares: Sequence[float]) -> "Mixture":
        """Cut texts of known length so that their shares come out exactly."""
        sizes = [text.characters for text in texts]
        if None not in sizes:
            total = min(size / share for size, share in zip(sizes, shares, strict=True))
            texts = [text.head(round(total * share)) for text, share in zip(texts, shares, strict=True)]
        return cls(texts, shares)

    @property
    def characters(self) -> int | None:
        sizes = [text.characters for text in self.texts]
        return None if None in sizes else sum(sizes)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(text.fingerprint for text in self.texts).encode()).hexdigest()

    @property
    def number_of_documents(self) -> int | None:
        numbers = [text.number_of_documents for text in self.texts]
        return None if None in numbers else sum(numbers)

    def sample(self, characters: int, window: int) -> "Mixture":
        samples = [
            text.sample(round(characters * share), window) for text, share in zip(self.texts, self.shares, strict=True)
        ]
        return replace(self, texts=samples)

    def head(self, characters: int) -> "Mixture":
        heads = [text.head(round(characters * share)) for text, share in zip(self.texts, self.shares, strict=True)]
        return replace(self, texts=heads)

    def parts(self) -> Iterator[tuple[bool, str]]:
        """One text after the other; if they arrive over a network, a document of the one furthest behind its share."""
        if self.characters is not None:
            yield from chain.from_iterable(text.parts() for text in self.texts)
            return
        sources, taken = [iter(text) for text in self.texts], [0] * len(self.texts)
        while True:
            behind = min(range(len(sources)), key=lambda i: taken[i] / self.shares[i])
            document = next(sources[behind], None)
            if document is None:
                return
            taken[behind] += len(document)
            yield True, document
