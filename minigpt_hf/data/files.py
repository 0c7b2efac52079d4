"""Find the files that `--data` names, and determine their formats from their names. No file is opened."""

# ruff: noqa: PTH110, PTH112, PTH114, PTH116, PTH118, PTH119, PTH122, PTH206, PTH208 (a `Path` for each of 200,000 files takes seconds)

import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from glob import has_magic
from itertools import takewhile
from pathlib import Path

from ..errors import MiniGPTError
from .reading import COMPRESSED_EXTENSIONS, path_of, printable

TEXT_EXTENSIONS = (
    ".txt .text .md .rst .tex .log .html .xml .py .pyi .ipynb .js .ts .c .h .cc .cpp .hpp .rs .go .java .kt .rb .php .sh "
    ".sql .lua .r .jl .hs .ml .scala .swift .css .yaml .yml .toml .ini .pgn .fasta .fa"
)
# File name extension -> format. The readers of all formats but `text` are in `tables.READERS`.
FORMAT_BY_EXTENSION: dict[str, str] = {
    **dict.fromkeys(TEXT_EXTENSIONS.split(), "text"),
    **dict.fromkeys(".jsonl .json .ndjson".split(), "json"),
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = tuple(dict.fromkeys(FORMAT_BY_EXTENSION.values()))
TABLE_EXTENSIONS = tuple(extension for extension, name in FORMAT_BY_EXTENSION.items() if name != "text")
# Files that describe the data when they are next to tables.
DOCUMENTATION_NAMES = ("readme", "license", "licence")
# Of URLs: HTTP, the Hub, and the object stores of `fsspec`, which need its packages for them, such as s3fs.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "hdfs", "memory")
PROTOCOLS = tuple(f"{name}://" for name in ("http", "https", "hf", *OBJECT_STORES))
WRITTEN = "of runs and models"  # reason to skip files
MAX_REASONS_SHOWN = 5
MAX_SHARES = 99_999
SHARD_CACHE = 50.0  # GB


def is_url(name: str) -> bool:
    return name.startswith(PROTOCOLS)


@dataclass(frozen=True)
class Share:
    """A contiguous share of the files or rows of a text, number `index` of `count`, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "3/16" -> Share(3, 16).

        Raises:
            MiniGPTError: if it is malformed.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARES:
            raise MiniGPTError(
                f"--shard {text}: expected I/N, the number of the shard from 0 to N - 1 and the number of shards (at most "
                f"{MAX_SHARES:,}), e.g. 0/16"
            )
        return cls(int(match[1]), int(match[2]))

    def of_rows(self, rows: int) -> range:
        """Return the positions of its rows."""
        return range(rows * self.index // self.count, rows * (self.index + 1) // self.count)

    def of_files(self, files: Sequence[str], sizes: Sequence[int]) -> list[str]:
        """Return its files: those whose middle is in this share of all bytes."""
        total, end, chosen = max(sum(sizes), 1), 0, []
        for file, size in zip(files, sizes, strict=True):
            end += size
            if min((2 * end - size) * self.count // (2 * total), self.count - 1) == self.index:
                chosen.append(file)
        return chosen

    def __str__(self) -> str:
        return f"shard-{self.index:05}-of-{self.count:05}"


def prepared_folder(data: str) -> Path | None:
    """Return the folder with `prepared.json` of a local folder written by `minigpt tokenize`; None for other data."""
    return next((folder for folder in (Path(data), Path(data) / "index") if (folder / "prepared.json").is_file()), None)


def exists(name: str) -> bool:
    """Whether a file or folder of this name exists; False for names that are too long."""
    return os.path.exists(name)


def extension_of(file: str) -> str:
    """Return the extension before that of a compression.

    notes.TXT -> .txt; https://…/rows.jsonl.gz?x=1 -> .jsonl; README -> ''.
    """
    name = os.path.basename(path_of(file))
    stem, extension = os.path.splitext(name.lower())
    if extension in COMPRESSED_EXTENSIONS:
        extension = os.path.splitext(stem)[1]
    return extension if extension != "." else ""


@dataclass
class FileSelection:
    """The files to read, and the number of skipped files by reason."""

    files: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def filter(self, predicate: Callable[[str], bool], reason: str) -> None:
        """Skip the files for which `predicate` is false."""
        selected = [file for file in self.files if predicate(file)]
        self.skipped[reason] += len(self.files) - len(selected)
        self.files = selected

    @property
    def summary(self) -> str:
        """E.g. "read 620 of 1,800 files", or "read 9 files"."""
        if not self.skipped.total():
            return f"read {len(self.files):,} files"
        return f"read {len(self.files):,} of {len(self.files) + self.skipped.total():,} files"

    @property
    def note(self) -> str:
        """The summary if files were skipped, otherwise ''."""
        return self.summary if self.skipped.total() else ""

    @property
    def has_other_extensions(self) -> bool:
        """Whether files were skipped because of their extensions, which `--data_format text` would read."""
        return any(
            number and (reason == "without extension" or reason[0] == "*") for reason, number in self.skipped.items()
        )

    @property
    def skipped_summary(self) -> str:
        """E.g. "skipped 1,180: 900 without extension, 270 *.png, 10 others"."""
        most = sorted((+self.skipped).items(), key=lambda item: (-item[1], item[0]))[:MAX_REASONS_SHOWN]
        named = [f"{number:,} {reason}" for reason, number in most]
        if rest := self.skipped.total() - sum(number for _, number in most):
            named.append(f"{rest:,} others")
        return f"skipped {self.skipped.total():,}: {', '.join(named)}"


# Words that identify a split in the names of files and folders: those that `datasets` recognizes.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def split_words(file: str, root: str) -> list[list[str]]:
    """Return the words in the name of a file, then of each of its folders below `root`: a/valid_0.jsonl -> valid; a."""
    stem, *folders = reversed(os.path.relpath(file, root).lower().split(os.sep))
    return [re.findall(r"[^\W\d_]+", name) for name in (os.path.splitext(stem)[0], *folders)]


def split_of(file: str, root: str) -> str | None:
    """Return the key of `SPLITS` that the name of a file, or else its folders, indicate: train-0-of-1.jsonl -> train."""
    for words in split_words(file, root):
        for split, keywords in SPLITS.items():
            if not set(words).isdisjoint(keywords):
                return split
    return None


def folder_of(pattern: str) -> str:
    """Return the innermost folder that contains every file a glob pattern can match."""
    return str(Path(*takewhile(lambda part: not has_magic(part), Path(pattern).parts[:-1])))


def _glob(path: Path) -> Iterator[Path]:
    return Path(path.anchor).glob(str(path.relative_to(path.anchor)))


def _prefixes(path: Path, root: str) -> list[Path]:
    """Return the patterns of the folders that a pattern searches: a/**/b/*.md -> a, a/**, a/**/b."""
    return [
        Path(*path.parts[:length])
        for length in range(max(1 + bool(path.anchor), len(Path(root).parts)), len(path.parts))
    ]


def _links_in(folder: Path) -> list[str]:
    """Return the links to folders in a folder."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_symlink() and os.path.isdir(entry.path)]


def files_matching(pattern: str) -> FileSelection:
    """Return the files that match a glob pattern, sorted.

    `**` matches any number of folders, and at the end of a pattern all files below them; not those of runs and models, and
    without following links. Hidden files and folders are skipped unless a component of the pattern starts with a dot.

    Raises:
        MiniGPTError: if a folder that is searched cannot be read.
    """
    path, selection, root = Path(pattern), FileSelection(), folder_of(pattern)
    if path.name == "**":
        path /= "*"

    @cache
    def in_written(folder: Path) -> bool:
        return folder != Path(root) and (is_written(os.listdir(folder)) or in_written(folder.parent))

    includes_hidden = any(part.startswith(".") for part in os.path.relpath(path, root).split(os.sep))

    def is_hidden(match: Path) -> bool:
        return not includes_hidden and any(part.startswith(".") for part in os.path.relpath(match, root).split(os.sep))

    searched = {folder for prefix in _prefixes(path, root) for folder in _glob(prefix) if folder.is_dir()}
    for folder in sorted(folder for folder in searched if folder == Path(root) or not is_hidden(folder)):
        if not os.access(folder, os.R_OK | os.X_OK):  # `glob` omits it without an error
            raise _unreadable(folder, "Permission denied")
    matches = sorted(_glob(path))
    for match in matches:
        if is_hidden(match):
            if not match.is_dir():
                selection.skipped["hidden"] += 1
        elif not match.is_file():
            is_unsearched_link = "**" in path.parts and match.is_symlink()  # `**` searches the other folders
            folders = "links to folders" if is_unsearched_link else "folders"
            selection.skipped[folders if match.is_dir() else "not regular files"] += 1
        elif "**" in path.parts and in_written(match.parent):
            selection.skipped[WRITTEN] += 1
        else:
            selection.files.append(str(match))
    found = {folder for match in matches for folder in (match, *match.parents)}
    for prefix in _prefixes(path, root):
        if prefix.name == "**":
            links = {Path(link) for folder in _glob(prefix) if not in_written(folder) for link in _links_in(folder)}
            selection.skipped["links to folders"] += sum(not is_hidden(link) for link in links - found)
    return selection


def files_below(
    folder: Path, extensions: Iterable[str] | None = FORMAT_BY_EXTENSION, excluded_folders: Iterable[str] = ()
) -> FileSelection:
    """Return all files below a folder, sorted; hidden files and folders, and those of runs and models, are skipped.

    Args:
        extensions: Extensions to select; None for all files.
        excluded_folders: Names of folders that are neither searched nor counted.

    Raises:
        MiniGPTError: if a subfolder cannot be read.
    """
    selection = FileSelection()
    for file, reason in _walk(str(folder), set(excluded_folders)):
        if reason := reason or _reason_to_skip(file, extensions):
            selection.skipped[reason] += 1
        else:
            selection.files.append(file)
    # Sorted like paths, component by component, so that the order is the same on every machine.
    selection.files.sort(key=lambda file: file.split(os.sep))
    return selection


def is_written(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names is a run folder or a model folder.

    They are not part of a text: a resumed run must not read what it has written, nor another run the files of the first.
    """
    return "minigpt.json" in names or ("recipe.yaml" in names and ("fingerprint.json" in names or "log.jsonl" in names))


def _unreadable(folder: os.PathLike | str, reason: str | None) -> MiniGPTError:
    return MiniGPTError(f"{printable(str(folder))}: cannot be read: {reason}; change its permissions or exclude it")


def _walk(folder: str, excluded_folders: set[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (path, why it is skipped) of everything below a folder except the folders that are searched."""

    def raise_error(error: OSError) -> None:
        raise _unreadable(error.filename, error.strerror) from error

    for parent, folders, files in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if name not in excluded_folders]
        if parent != folder and is_written(files):
            for below, _, names in os.walk(parent):
                yield from ((os.path.join(below, name), WRITTEN) for name in names)
            folders.clear()
            continue
        links = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(parent, name))]
        for name in [*files, *links]:
            yield os.path.join(parent, name), "hidden" if name.startswith(".") else None
        folders[:] = [name for name in folders if not name.startswith(".")]


def _reason_to_skip(file: str, extensions: Iterable[str] | None) -> str | None:
    if reason := reason_of_name(file, extensions):
        return "links to folders" if os.path.islink(file) and os.path.isdir(file) else reason
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return "broken links"
    if stat.S_ISREG(mode):
        return None
    return "links to folders" if stat.S_ISDIR(mode) else "not regular files"


def reason_of_name(file: str, extensions: Iterable[str] | None) -> str | None:
    """Return why a file is skipped because of its name; None if its extension is one of `extensions`."""
    if extensions is None or extension_of(file) in extensions:
        return None
    suffix = os.path.splitext(file)[1].lower()
    if len(suffix) < 2:
        return "without extension"
    return f"*{printable(suffix)}{' of unknown kind' if suffix in COMPRESSED_EXTENSIONS else ''}"


def standard_library() -> list[str]:
    """Return the .py files of the Python standard library: several megabytes of text available on every machine.

    Tests, encoding tables and files specific to this installation are excluded.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
    return [
        file
        for file in files_below(folder, (".py",), excluded).files
        if not os.path.basename(file).startswith("_sysconfigdata")
    ]
