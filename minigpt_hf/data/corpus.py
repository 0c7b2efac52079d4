"""Where text comes from, as documents, and the cut into train and validation.

In: a file, a folder, a URL, or `stdlib` (the Python standard library's source on this disk). Out: a `Corpus` of two
`Documents` that share none. It refuses what is not there, what is empty and what is not text, in one line.

A document is a text that stands for itself: a file. `datasets` reads it (line endings become "\\n") and keeps it
memory-mapped on disk, so a corpus may be larger than memory.
"""

import codecs
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

# What is read in a folder. A single file is read whatever its ending.
TEXT_ENDINGS = frozenset(
    ".txt .text .md .rst .tex .log .csv .tsv .html .xml .py .pyi .ipynb .js .ts .c .h .cc .cpp .hpp .rs .go .java .kt "
    ".rb .php .sh .sql .lua .r .jl .hs .ml .scala .swift .css .yaml .yml .toml .ini .pgn .fasta .fa".split()
)
# Below this many documents a tenth of them is too coarse a cut, and the tail of the text serves as validation.
FEWEST_DOCUMENTS_TO_CHOOSE_FROM = 20


@dataclass(frozen=True)
class Documents:
    """Some rows of a dataset, in order; the first may begin late and the last may end early, counted in characters.

    Iterating yields each text as a `str`, any number of times, reading from disk as it goes.
    """

    rows: datasets.Dataset
    indices: list[int]
    digests: list[bytes]
    lengths: list[int]
    start: int = 0
    stop: int | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[str]:
        last = len(self.indices) - 1
        for place, index in enumerate(self.indices):
            text = self.rows[index]["text"]
            yield text[self.start if place == 0 else 0 : self.stop if place == last else None]

    @property
    def characters(self) -> int:
        """How long all of it is."""
        return sum(len(range(self.lengths[i])[self._cut(place)]) for place, i in enumerate(self.indices))

    @property
    def fingerprint(self) -> str:
        """Hash of the content: the same texts cut at the same places give the same 64 hex digits on any machine."""
        digest = hashlib.sha256(f"{self.start} {self.stop}".encode())
        for index in self.indices:
            digest.update(self.digests[index])
        return digest.hexdigest()

    def head(self, characters: int) -> "Documents":
        """The first so many characters, which may cut the last document short."""
        kept: list[int] = []
        for place, index in enumerate(self.indices):
            span = range(self.lengths[index])[self._cut(place)]
            kept.append(index)
            if len(span) >= characters:
                return Documents(self.rows, kept, self.digests, self.lengths, self.start, span.start + characters)
            characters -= len(span)
        return self

    def _cut(self, place: int) -> slice:
        return slice(self.start if place == 0 else 0, self.stop if place == len(self.indices) - 1 else None)


@dataclass(frozen=True)
class Corpus:
    """A text cut in two: one part to learn from, one to be examined on.

    `cut` says how, in words that go into the model folder. `validation` is empty if `validation_fraction` is 0.
    """

    name: str
    train: Documents
    validation: Documents
    cut: str


def load_corpus(data: str, validation_fraction: float = 0.1, encoding: str = "utf-8") -> Corpus:
    """Read text as documents and cut it into train and validation.

    Args:
        data: A file, a folder (read with its subfolders), an http(s) URL, or `stdlib`.
        validation_fraction: Share of the documents kept for validation. Of 20 documents or more, those whose content has
            the lowest hashes, so that a document stays on its side whatever the order of files; of fewer, the tail of
            the text, in characters.
        encoding: Of the files.

    Raises:
        ValueError: if there is nothing there, no text in it, or it is not text in that encoding.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}: a share in [0, 1) is held out, e.g. 0.1")
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is unknown; try utf-8, latin-1, cp1252 or utf-16") from error
    rows = _read(data, encoding)
    digests, lengths = [], []
    for row in rows:
        digests.append(hashlib.sha256(row["text"].encode()).digest())
        lengths.append(len(row["text"]))
    present = [i for i, length in enumerate(lengths) if length]
    if not present:
        raise ValueError(f"{data}: there is no text in it; give a file or a folder with some")

    def documents(indices: list[int], start: int = 0, stop: int | None = None) -> Documents:
        return Documents(rows, indices, digests, lengths, start, stop)

    if validation_fraction == 0:
        return Corpus(data, documents(present), documents([]), "no validation")
    if len(present) >= FEWEST_DOCUMENTS_TO_CHOOSE_FROM:
        # Copies of a document have one hash, so they are on one side together.
        ranked = sorted({digests[i] for i in present})
        held_out = set(ranked[: max(1, round(len(ranked) * validation_fraction))])
        train = [i for i in present if digests[i] not in held_out]
        # By hash, too: the head of this part is a fair sample of it.
        validation = sorted((i for i in present if digests[i] in held_out), key=lambda i: digests[i])
        if train:
            cut = f"{len(validation)} of {len(present)} documents, those with the lowest hash of their content"
            return Corpus(data, documents(train), documents(validation), cut)

    total = sum(lengths[i] for i in present)
    cut_at = int(total * (1 - validation_fraction))
    whole = documents(present)
    train = whole.head(cut_at)
    cut = f"the last {total - cut_at:,} of {total:,} characters"
    if train.stop == lengths[train.indices[-1]]:
        return Corpus(data, documents(train.indices), documents(present[len(train) :]), cut)
    return Corpus(data, train, documents(present[len(train) - 1 :], start=train.stop), cut)


def _read(data: str, encoding: str) -> datasets.Dataset:
    """Let `datasets` read each file as one row, `text`."""
    if data == "stdlib":
        files = _standard_library()
    elif data.startswith(("http://", "https://")):
        files = [data]
    elif (path := Path(data)).is_dir():
        files = _files_below(path, TEXT_ENDINGS)
        if not files:
            raise ValueError(f"{data}: no text file in this folder; looked for {' '.join(sorted(TEXT_ENDINGS))}")
    elif path.is_file():
        files = [str(path)]
    else:
        raise ValueError(f"{data}: no such file or folder; give a text file, a folder, a URL or `stdlib`")
    # The mark that some editors put before the first character is no part of the text.
    read_as = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        return datasets.load_dataset("text", data_files=files, sample_by="document", encoding=read_as, split="train")
    except DatasetGenerationError as error:
        _raise_if_undecodable(files, encoding)
        raise ValueError(f"{data}: cannot be read: {error.__cause__ or error}") from error
    except OSError as error:  # a URL that does not answer, a file without permission
        raise ValueError(f"{data}: cannot be read: {error}") from error


def _files_below(folder: Path, endings: frozenset[str]) -> list[str]:
    """All files with these endings, sorted; hidden files and folders are left out."""
    return [
        str(file)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in endings
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _standard_library() -> list[str]:
    """The .py files of this Python: real text, some megabytes, on every machine.

    Left out are tests, tables, and what describes this very machine.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
    return [
        file
        for file in _files_below(folder, frozenset({".py"}))
        if left_out.isdisjoint(Path(file).relative_to(folder).parts)
        and not Path(file).name.startswith("_sysconfigdata")
    ]


def _raise_if_undecodable(files: list[str], encoding: str) -> None:
    """Name the file and the byte that are not text."""
    for file in files:
        if Path(file).is_file():
            try:
                Path(file).read_bytes().decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: not {encoding} text: byte {error.object[error.start]:#04x} at position {error.start}; "
                    "name its encoding, e.g. --encoding latin-1, or leave this file out"
                ) from error
