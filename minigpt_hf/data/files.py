"""Which files a name stands for, and which reader each of them has.

In: names and endings. Out: lists of regular files, and a count of what was left out, by reason. No file is opened here.
"""

# ruff: noqa: PTH110, PTH112, PTH114, PTH116, PTH118, PTH119, PTH122, PTH206 (a `Path` for each of 200,000 files takes seconds)

import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlparse

from ..errors import MiniGPTError
from .reading import COMPRESSED, shown

TEXT = (
    ".txt .text .md .rst .tex .log .html .xml .py .pyi .ipynb .js .ts .c .h .cc .cpp .hpp .rs .go .java .kt .rb .php .sh "
    ".sql .lua .r .jl .hs .ml .scala .swift .css .yaml .yml .toml .ini .pgn .fasta .fa"
)
# The one table from a file's ending to its format.
FORMAT_OF: dict[str, str] = {
    **dict.fromkeys(TEXT.split(), "text"),
    **dict.fromkeys(".jsonl .json .ndjson".split(), "json"),
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("text", "json", "csv", "parquet", "arrow")
# Beside tables these are about the data, not part of it.
ABOUT = ("readme", "license", "licence")
REASONS_SHOWN = 5


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://", "hf://"))


def exists(name: str) -> bool:
    """Whether there is a file or folder of that name; no, if it is too long for one."""
    return os.path.exists(name)


def ending_of(file: str) -> str:
    """notes.TXT -> .txt; https://…/rows.jsonl.gz?x=1 -> .jsonl; README -> ''."""
    name = os.path.basename(urlparse(file).path if is_url(file) else file)
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        ending = os.path.splitext(stem)[1]
    return ending if ending != "." else ""


@dataclass
class Found:
    """The files to read, and how many others were left out for which reason."""

    files: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def keep(self, is_kept, reason: str) -> None:
        """Leave out the files that are not to be kept."""
        kept = [file for file in self.files if is_kept(file)]
        self.skipped[reason] += len(self.files) - len(kept)
        self.files = kept

    @property
    def read_of_all(self) -> str:
        """E.g. "read 620 of 1,800 files", or "read 9 files"."""
        if not self.skipped.total():
            return f"read {len(self.files):,} files"
        return f"read {len(self.files):,} of {len(self.files) + self.skipped.total():,} files"

    @property
    def note(self) -> str:
        """The same, if not all were."""
        return self.read_of_all if self.skipped.total() else ""

    @property
    def of_other_kinds(self) -> bool:
        """Whether files were left out that can be read as text."""
        return any(number and (why == "without extension" or why[0] == "*") for why, number in self.skipped.items())

    @property
    def reasons(self) -> str:
        """E.g. "skipped 1,180: 900 without extension, 270 *.png, 10 others"."""
        most = sorted((+self.skipped).items(), key=lambda item: (-item[1], item[0]))[:REASONS_SHOWN]
        named = [f"{number:,} {reason}" for reason, number in most]
        if rest := self.skipped.total() - sum(number for _, number in most):
            named.append(f"{rest:,} others")
        return f"skipped {self.skipped.total():,}: {', '.join(named)}"


# The words for a split in the names of files and folders: those that `datasets` looks for.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def split_words(file: str, root: str) -> list[list[str]]:
    """The words in the name of a file and of each folder below `root` that it is in: a/valid_0.jsonl -> valid; a."""
    stem, *folders = reversed(os.path.relpath(file, root).lower().split(os.sep))
    return [re.findall(r"[^\W\d_]+", name) for name in (os.path.splitext(stem)[0], *folders)]


def split_of(file: str, root: str) -> str | None:
    """Which of `SPLITS` a file is of, by its name or else by the folders it is in: train-00000-of-00001.jsonl -> train."""
    for words in split_words(file, root):
        for split, keywords in SPLITS.items():
            if not set(words).isdisjoint(keywords):
                return split
    return None


def folder_of(pattern: str) -> str:
    """The folder below which all files are that a glob stands for."""
    return str(Path(*takewhile(lambda part: not has_magic(part), Path(pattern).parts[:-1])))


def files_matching(pattern: str) -> Found:
    """Files that a glob stands for, sorted; `**` is any number of folders, and at the end all files below them.

    Hidden files and folders are left out, unless a part of the pattern begins with a dot.
    """
    path, found, root = Path(pattern), Found(), folder_of(pattern)
    if path.name == "**":
        path /= "*"
    names_hidden = any(part.startswith(".") for part in os.path.relpath(path, root).split(os.sep))
    for match in sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))):
        if not names_hidden and any(part.startswith(".") for part in os.path.relpath(match, root).split(os.sep)):
            if not match.is_dir():
                found.skipped["hidden"] += 1
        elif match.is_file():
            found.files.append(str(match))
        else:
            found.skipped["folders" if match.is_dir() else "not regular files"] += 1
    return found


def files_below(folder: Path, endings: Iterable[str] | None = FORMAT_OF, without: Iterable[str] = ()) -> Found:
    """All files with these endings (None: with any), in order; hidden files and folders are left out.

    Args:
        without: Names of folders that are not looked into, nor reported.

    Raises:
        MiniGPTError: for a folder below it that cannot be read.
    """
    found = Found()
    for file, is_hidden in _walk(str(folder), set(without)):
        if reason := "hidden" if is_hidden else _reason_to_skip(file, endings):
            found.skipped[reason] += 1
        else:
            found.files.append(file)
    # As paths compare: folder by folder. Every machine reads a folder in the same order.
    found.files.sort(key=lambda file: file.split(os.sep))
    return found


def _walk(folder: str, without: set[str]) -> Iterator[tuple[str, bool]]:
    """(path, is it hidden?) of everything below a folder that is not itself a folder to look into."""

    def refuse(error: OSError) -> None:
        raise MiniGPTError(
            f"{shown(error.filename)}: cannot be read: {error.strerror}; change its permissions, or leave it out"
        ) from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in without]
        links = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(place, name))]
        for name in [*files, *links]:
            yield os.path.join(place, name), name.startswith(".")
        folders[:] = [name for name in folders if not name.startswith(".")]


def _reason_to_skip(file: str, endings) -> str | None:
    if endings is None or ending_of(file) in endings:
        try:
            mode = os.stat(file).st_mode
        except OSError:
            return "broken links"
        if stat.S_ISREG(mode):
            return None
        return "links to folders" if stat.S_ISDIR(mode) else "not regular files"
    if os.path.islink(file) and os.path.isdir(file):
        return "links to folders"
    suffix = os.path.splitext(file)[1].lower()
    if len(suffix) < 2:
        return "without extension"
    return f"*{shown(suffix)}{' of unknown kind' if suffix in COMPRESSED else ''}"


def standard_library() -> list[str]:
    """The .py files of this Python: real text, some megabytes, on every machine.

    Left out are tests, tables, and what describes this very machine.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
    return [
        file
        for file in files_below(folder, (".py",), left_out).files
        if not os.path.basename(file).startswith("_sysconfigdata")
    ]
