"""Documents, in order, read from disk or from the network as they are needed.

A document is a file of text or a row of a table. Out: `Texts`, which yield their documents any number of times, in parts of
at most a million characters, so that a corpus may be larger than memory. Files of text are read through
`datasets.IterableDataset.from_generator`, tables are memory-mapped `datasets.Dataset`s. Raises `UnreadableFileError` for a
file that is not text, or whose content has changed since it was indexed.
"""

import codecs
import hashlib
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc

from ..errors import UnreadableFileError
from .cache import cached
from .reading import Decoding, Seen, decoded, digest_of, has_changed, pieces, shown

logger = logging.getLogger(__name__)

PART_CHARACTERS = 1_000_000
# A sample consists of at least this many excerpts, so that no single passage of a long document decides a score.
EXCERPTS = 20

# A document: its row in the table or place in the list of files, which characters of it are meant, and the SHA-256 of the
# UTF-8 of all of it.
INDEX = np.dtype([("row", "<i8"), ("begin", "<i8"), ("end", "<i8"), ("digest", "V32")])


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
    """Documents of `source`; `index` [number of documents] says which, and which characters of each."""

    source: "Rows | Files"
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

    @property
    def digests(self) -> list[bytes]:
        """The SHA-256 of the whole of each document."""
        return [digest.tobytes() for digest in self.index["digest"]]

    def select(self, places: np.ndarray) -> "Documents":
        """Some of the documents, by place or by mask."""
        return replace(self, index=self.index[places])

    def cut(self, characters: int) -> tuple["Documents", "Documents"]:
        """The first so many characters, and the rest; a document may be cut in two."""
        if characters <= 0:
            return self.select(np.arange(0)), self
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
        return self.source.parts(self.index, 1)

    def evenly(self, characters: int) -> Iterator[str]:
        return (text for _, text in self.source.parts(self.index, -(-self.characters // characters)))


def runs(index: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of documents of at most `PART_CHARACTERS` together, or one document that is longer."""
    lengths, place = index["end"] - index["begin"], 0
    while place < len(index):
        stop, room = place + 1, PART_CHARACTERS - lengths[place]
        while stop < len(index) and lengths[stop] <= room:
            room -= lengths[stop]
            stop += 1
        yield index[place:stop]
        place = stop


def with_text(index: np.ndarray, kind: str) -> np.ndarray:
    """The documents that have text; the others are reported."""
    if without := int((index["end"] == 0).sum()):
        logger.info("%s of %s %s have no text and are left out", f"{without:,}", f"{len(index):,}", kind)
    return index[index["end"] > 0]


# -- rows of a table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A memory-mapped dataset with the column `text`: each row is a document."""

    rows: datasets.Dataset

    def parts(self, index: np.ndarray, every: int) -> Iterator[tuple[bool, str]]:
        """The documents in parts, but of all runs of documents only the first of `every`."""
        table = self.rows.with_format("arrow")
        for few in islice(runs(index), 0, None, every):
            for one, text in zip(few, table[few["row"]]["text"].to_pylist(), strict=True):
                for begin in range(one["begin"], one["end"], PART_CHARACTERS):
                    yield begin == one["begin"], text[begin : min(begin + PART_CHARACTERS, one["end"])]

    def documents(self, cache_dir: Path) -> "Documents":
        """All of them; rows without text are left out."""
        return Documents(self, with_text(index_kept(self.rows, cache_dir), "rows"))


def index_of_rows(rows: datasets.Dataset) -> np.ndarray:
    """The index of a dataset each of whose rows is a document."""
    digests, lengths = [], []
    for table in rows.with_format("arrow").iter(10_000):
        column = table["text"]
        lengths.append(pc.fill_null(pc.utf8_length(column), 0).to_numpy())
        digests += [hashlib.sha256(text.as_buffer()).digest() if text.is_valid else bytes(32) for text in column]
    index = np.zeros(len(rows), dtype=INDEX)
    index["row"] = np.arange(len(rows))
    index["end"] = np.concatenate(lengths) if lengths else 0
    index["digest"] = np.frombuffer(b"".join(digests), dtype="V32")
    return index


def index_kept(rows: datasets.Dataset, cache_dir: Path) -> np.ndarray:
    """`index_of_rows(rows)`, or what it gave for the same content before: hashing each of many rows takes a while."""
    digest = hashlib.sha256(f"{rows._fingerprint} {rows.num_rows} {rows.column_names}".encode())
    for file in rows.cache_files:
        digest.update(digest_of(file["filename"], file["filename"]).encode())
    return cached(
        cache_dir / "documents" / digest.hexdigest()[:32],
        lambda folder: np.save(folder / "index.npy", index_of_rows(rows)),
        lambda folder: np.load(folder / "index.npy"),
        cache_dir,
        "index of documents",
    )


# -- files of text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Files of text, each a document. `names` gives the name to show for a path that has another."""

    paths: tuple[str, ...]
    decoding: Decoding
    names: dict[str, str] = field(default_factory=dict)

    def parts(self, index: np.ndarray, every: int) -> Iterator[tuple[bool, str]]:
        """As for `Rows`; of a document longer than a part, only each `every`-th part.

        Raises:
            UnreadableFileError: for a file whose content is not that of its hash in the index.
        """
        kwargs = {"files": self, "index": index, "every": every}
        last = None
        for row in datasets.IterableDataset.from_generator(read_parts, gen_kwargs=kwargs):
            yield row["document"] != last, row["text"]
            last = row["document"]

    def documents(self) -> "Documents":
        """All of them; files without text are left out.

        Raises:
            UnreadableFileError: for what is not text, see `reading`.
        """
        index, seen = np.zeros(len(self.paths), dtype=INDEX), []
        for place, path in enumerate(self.paths):
            seen.append(Seen())
            digest, length = hashlib.sha256(), 0
            for text in decoded(path, self.name(path), self.decoding, PART_CHARACTERS, seen[-1]):
                digest.update(self.encode(path, text))
                length += len(text)
            index[place] = (place, 0, length, digest.digest())
        self._report(seen)
        return Documents(self, with_text(index, "files"))

    def name(self, path: str) -> str:
        return self.names.get(path, path)

    def encode(self, path: str, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:  # some encodings, `unicode_escape` for one, can spell it
            raise UnreadableFileError(
                f"{shown(self.name(path))}: holds U+{ord(text[error.start]):04X}, half of a surrogate pair, which is not "
                "a character; name another encoding, or leave this file out"
            ) from error

    def _report(self, seen: list[Seen]) -> None:
        """Log what a user may not expect of these files."""
        with_mark = [path for path, one in zip(self.paths, seen, strict=True) if one.byte_order_mark]
        if with_mark:
            without = {"utf-8": "utf-8-sig", "utf-16-le": "utf-16", "utf-16-be": "utf-16"}
            name = without.get(codecs.lookup(self.decoding.encoding).name, "utf-8-sig")
            logger.warning(
                "%s with a byte order mark, kept as the character U+FEFF; --encoding %s drops it",
                self._some(with_mark, "begins", "begin"),
                name,
            )
        with_zeros = [path for path, one in zip(self.paths, seen, strict=True) if one.zeros]
        if with_zeros:
            logger.warning(
                "%s zero characters (U+0000): UTF-16 text, which --encoding utf-16 reads, or not text at all?",
                self._some(with_zeros, "holds", "hold"),
            )
        if self.decoding.newline == "universal":
            logger.info("converted %s line ends (CRLF, CR) to LF", f"{sum(one.newlines_converted for one in seen):,}")

    def _some(self, paths: list[str], verb: str, verb_of_many: str) -> str:
        first = shown(self.name(paths[0]))
        return f"{first} {verb}" if len(paths) == 1 else f"{len(paths):,} files ({first}, …) {verb_of_many}"


def read_parts(files: Files, index: np.ndarray, every: int) -> Iterator[dict]:
    """Rows {document, text}; see `Files.parts`. `document` is a place in the index."""
    place = number = 0
    for few in runs(index):
        is_long = len(few) == 1 and few["end"][0] - few["begin"][0] > PART_CHARACTERS
        for excerpts in np.split(few, np.flatnonzero(np.diff(few["row"])) + 1):  # those of one file: it is read once
            if is_long or number % every == 0:
                for offset, text in _read_excerpts(files, excerpts):
                    if number % every == 0:
                        yield {"document": place + offset, "text": text}
                    number += is_long
            place += len(excerpts)
        number += not is_long


def _read_excerpts(files: Files, excerpts: np.ndarray) -> Iterator[tuple[int, str]]:
    """(place, text) of the characters `begin` to `end` of each excerpt of one file. Reads all of it, to verify its hash."""
    path, digest, position = files.paths[excerpts["row"][0]], hashlib.sha256(), 0
    for text in pieces(path, files.name(path), files.decoding, PART_CHARACTERS):
        digest.update(files.encode(path, text))
        for place, (begin, end) in enumerate(zip(excerpts["begin"].tolist(), excerpts["end"].tolist(), strict=True)):
            if found := text[max(begin - position, 0) : max(end - position, 0)]:
                yield place, found
        position += len(text)
    if digest.digest() != excerpts["digest"][0].tobytes():
        raise has_changed(files.name(path))


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

    @classmethod
    def joined(cls, texts: Sequence[Texts]) -> "Mixture":
        """All of several texts of known length."""
        return cls(texts, [text.characters / sum(text.characters for text in texts) for text in texts])

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
