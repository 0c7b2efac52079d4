"""What `--data` names -> rows of text, through `datasets`.

In: a file, folder, glob, URL, saved dataset, Hub dataset, `stdlib` or `-`. Out: `Texts`, and those of a validation split of
its own if it has one. It refuses, in one line, what is not there, what has no reader, and what is not text.

A document is a file, if it is text, or a row, if it is a table.
"""

import logging
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import has_magic
from itertools import chain
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError

from ..errors import MiniGPTError, UnreadableFileError
from .documents import Documents, Files, Rows, StreamedDocuments, Texts
from .files import (
    ABOUT,
    FORMAT_OF,
    SPLITS,
    Found,
    ending_of,
    files_below,
    files_matching,
    folder_of,
    is_url,
    split_of,
    split_words,
    standard_library,
)
from .hub_access import cache_alone_if_unreachable
from .reading import COMPRESSED, Decoding, keep, shown
from .tables import read_tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """What a source holds: the text, the validation split that comes with it, and which share of its files was read."""

    train: Texts
    validation: Texts | None = None
    note: str = ""


@dataclass(frozen=True)
class Source:
    """What to read, and how; the fields are those of `load_corpus`."""

    data: str
    decoding: Decoding
    split: str | None
    text_column: str | None
    data_format: str | None
    streaming: bool
    cache_dir: Path
    names: dict[str, str] = field(default_factory=dict)  # of paths that the user does not know

    def read(self) -> Reading:
        """The text to learn from, and the validation split that comes with it, if one does and no split was asked for."""
        if not self.data.strip():
            raise MiniGPTError(
                f"data is {self.data!r}: it names no text; give a file, a folder (`.` for this one), a URL, a Hub dataset, "
                "`stdlib`, or - for standard input"
            )
        path = Path(self.data)
        if self.streaming and not names_hub_dataset(self.data):
            raise MiniGPTError(
                f"--streaming reads datasets of the Hub as they arrive; {self.data} is none: leave it out"
            )
        if (path / "prepared.json").is_file():
            raise MiniGPTError(
                f"{self.data}: is a prepared text, tokens which only training takes; give the text itself"
            )
        try:
            if self.data == "stdlib":
                if path.exists():
                    logger.warning("stdlib is the Python standard library; the file or folder of that name is ./stdlib")
                return Reading(self._read(standard_library()))
            if self.data == "-":
                return self._of_files([self._spooled("standard input", sys.stdin.buffer.read)])
            if is_url(self.data):
                return self._of_files(self._downloaded())
            if path.is_dir():
                return self._of_saved(path) if is_saved(path) else self._of_folder(path)
            if os.path.lexists(path):
                if self.data.endswith(os.sep):
                    raise MiniGPTError(f"{self.data}: is a file, not a folder; leave out the {os.sep} at the end")
                return self._of_files([self._regular(path)])
            if (found := files_matching(self.data)).files:
                return self._of_found(found, folder_of(self.data), "read as a pattern, since no file has that name: ")
            if names_hub_dataset(self.data):
                with cache_alone_if_unreachable():
                    return self._of_hub()
        except UnreadableFileError:
            raise
        except DatasetGenerationError as error:
            raise _unreadable(self.data, error) from error
        except (OSError, pa.ArrowException) as error:  # a URL that does not answer, no permission, half a file
            raise MiniGPTError(f"{self.data}: cannot be read: {_first_line(error)}") from error
        raise MiniGPTError(
            f"{self.data}: no such file or folder; give a text file, a table, a folder, a glob, a URL, a Hub dataset "
            "(user/name), `stdlib`, or - for standard input"
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def _of_folder(self, folder: Path) -> Reading:
        """All files below it that have a reader, or all files if a format was named; hidden ones are left out."""
        found = files_below(folder, FORMAT_OF if self.data_format is None else None)
        formats = {file: self._format_of(file) for file in found.files}
        tables = [file for file in found.files if formats[file] != "text"]
        if tables:
            found.keep(lambda file: not Path(file).stem.lower().startswith(ABOUT), "named README or LICENSE")
        kinds = {formats[file]: ending_of(file) for file in found.files}
        if len(kinds) > 1:
            raise MiniGPTError(
                f"{folder}: holds {len(found.files) - len(tables):,} files of text and {len(tables):,} tables "
                f"({', '.join(sorted(kinds.values()))}), of which the documents would not be alike; name one kind, "
                f"--data '{folder}/**/*{ending_of(tables[0])}', or learn all as text: --data_format text"
            )
        if not found.files:
            skipped = f" ({found.reasons}); --data_format text reads every file" if found.skipped else ""
            raise MiniGPTError(
                f"{folder}: no text file or table in this folder; looked for {' '.join(FORMAT_OF)}{skipped}"
            )
        return self._of_found(found, str(folder))

    def _of_found(self, found: Found, root: str, how: str = "") -> Reading:
        """The files of a folder or glob; those of the validation split, by their names, are held out, of test left out."""
        if not _has_splits(found.files, root, all(self._format_of(file) == "text" for file in found.files)):
            self._report(found, how)
            return self._of_files(found.files, found)
        if self.split:
            asked = {file for file in found.files if _is_of_split(file, root, self.split)}
            if not asked:
                stems = sorted({shown(Path(file).stem) for file in found.files})
                raise MiniGPTError(
                    f"{self.data}: has no file for --data_split {self.split}; there are {', '.join(stems)}"
                )
            found.keep(asked.__contains__, "of other splits")
            self._report(found, how)
            return Reading(self._read(found.files), note=found.note)
        splits = {file: split_of(file, root) for file in found.files}
        held_out = []
        if not {"validation", "test"}.issuperset(splits.values()):  # else there is nothing to learn from: no splits
            found.keep(lambda file: splits[file] != "test", "of the test split")
            held_out = [file for file in found.files if splits[file] == "validation"]
        self._report(found, how)
        if held_out:
            names = shown(os.path.relpath(held_out[0], root)) + ", …" * (len(held_out) > 1)
            logger.info("%s: %s of the files for validation, as named: %s", shown(self.data), len(held_out), names)
        is_held_out = set(held_out).__contains__
        train = self._read([file for file in found.files if not is_held_out(file)])
        return Reading(train, self._read(held_out) if held_out else None, found.note)

    def _of_files(self, files: list[str], found: Found | None = None) -> Reading:
        if self.split:
            raise MiniGPTError(
                f"--data_split {self.split}: splits are of datasets, and {shown(self.data)} is not one; leave it out"
            )
        return Reading(self._read(files), note=found.note if found else "")

    def _report(self, found: Found, how: str = "") -> None:
        """Log how many files are read, and which are not."""
        skipped = f"; {found.reasons}" if found.skipped.total() else ""
        hint = "; --data_format text reads every file that is not hidden" if found.of_other_kinds else ""
        logger.info("%s: %s%s%s%s", shown(self.data), how, found.read_of_all, skipped, hint)

    def _format_of(self, file: str) -> str:
        if self.data_format is not None:
            return self.data_format
        ending = ending_of(name := self.names.get(file, file))
        if ending and ending not in FORMAT_OF:
            raise MiniGPTError(
                f"{name}: nothing here reads {ending} files; known are {' '.join(FORMAT_OF)}, plain or "
                f"{' '.join(COMPRESSED)}; if it is text, say --data_format text"
            )
        return FORMAT_OF[ending] if ending else "text"

    def _read(self, files: list[str]) -> Documents:
        """Each file is a document, if they are text; each row is one, if they are tables."""
        formats = {self._format_of(file): file for file in files}
        if len(formats) > 1:
            raise MiniGPTError(
                f"{self.data}: holds files of different kinds ({', '.join(formats.values())}); name one kind"
            )
        for file in files:
            if not os.access(file, os.R_OK):
                raise MiniGPTError(f"{file}: you may not read this file; change its permissions, or leave it out")
        (kind,) = formats
        if kind == "text":
            if self.text_column:
                logger.warning("--text_column %s has no effect: %s is text", self.text_column, shown(self.data))
            return Files(tuple(files), self.decoding, self.names).documents()
        if self.decoding.newline != "preserve":
            logger.warning("--newline has no effect on tables such as %s", shown(self.names.get(files[0], files[0])))
        rows = read_tables(kind, files, self.names, self.decoding, self.cache_dir, self._column)
        return Rows(rows).documents(self.cache_dir)

    def _regular(self, path: Path) -> str:
        """The file itself; what arrives through a descriptor of this process, as `<(command)` does, is spooled."""
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return self.data
        if stat.S_ISFIFO(mode) and self.data.startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
            with path.open("rb") as file:
                return self._spooled(self.data, file.read)
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise MiniGPTError(
            f"{self.data}: is a {kinds.get(stat.S_IFMT(mode), 'special file')}, not a regular file; write its content to a "
            "file, or pipe it in: … | minigpt … --data -"
        )

    def _spooled(self, name: str, read: Callable[[int], bytes]) -> str:
        """Kept as a file under the hash of its content: it can be read once, and a text is read several times."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MiniGPTError(f"--data {self.data}: {name} reaches one process of several; write it to a file")
        path, _ = keep(iter(lambda: read(1 << 20), b""), self.cache_dir / "stdin", ".txt")
        self.names[str(path)] = name
        return str(path)

    def _downloaded(self) -> list[str]:
        """The files of a URL, in the cache of `datasets`; a pattern may name several of the Hub."""
        system, place = fsspec.core.url_to_fs(self.data)
        urls = [self.data]
        if self.data.startswith("hf://") and has_magic(self.data):
            urls = sorted(f"hf://{file}" for file in system.glob(place))
        # Without an ETag there is no telling whether what was downloaded before is still what is there.
        is_known = self.data.startswith("hf://") or {"ETag", "etag"} & system.info(place).keys()
        download = datasets.DownloadManager(download_config=datasets.DownloadConfig(force_download=not is_known))
        paths = [str(path) for path in download.download(urls)]
        self.names.update(zip(paths, urls, strict=True))
        return paths

    # -- datasets -----------------------------------------------------------------------------------------------------

    def _of_saved(self, folder: Path) -> Reading:
        """A folder that `save_to_disk` wrote."""
        found = datasets.load_from_disk(str(folder))
        splits = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({"train": found})
        return self._of_splits(splits)

    def _of_hub(self) -> Reading:
        """`user/name` or `user/name:config`."""
        name, _, config = self.data.partition(":")
        try:
            if not self.streaming:
                if self.split:
                    return Reading(self._of_rows(datasets.load_dataset(name, config or None, split=self.split)))
                return self._of_splits(datasets.load_dataset(name, config or None))
            builder = datasets.load_dataset_builder(name, config or None)
            # Its folder is named after repository, configuration, version and revision.
            identity = " ".join(Path(builder.cache_dir).parts[-4:])
            return self._of_splits(builder.as_streaming_dataset(), identity)
        except (ConnectionError, FileNotFoundError) as error:
            raise MiniGPTError(
                f"{self.data}: is no file or folder here, and cannot be had from the Hub: {_first_line(error)}"
            ) from error

    def _of_splits(self, splits: dict, identity: str = "") -> Reading:
        asked = self.split or "train"
        if asked not in splits:
            raise MiniGPTError(f"{self.data}: has no split {asked!r}; say --data_split, one of {', '.join(splits)}")
        own = next((name for name in SPLITS["validation"] if name in splits), None) if self.split is None else None
        texts = [self._of_rows(splits[name], f"{identity} {name}") for name in (asked, own) if name is not None]
        return Reading(*texts)

    def _of_rows(self, rows: datasets.Dataset | datasets.IterableDataset, identity: str = "") -> Texts:
        if isinstance(rows, datasets.IterableDataset):
            of_text = [name for name, value in next(iter(rows), {}).items() if isinstance(value, str)]
            column = self._column(of_text, of_text, of_text)
            rows = rows.select_columns([column])
            rows = rows if column == "text" else rows.rename_column(column, "text")
            return StreamedDocuments(rows, f"{identity} {column}")
        return self._documents(rows)

    def _documents(self, rows: datasets.Dataset) -> Documents:
        of_text = [name for name, kind in rows.features.items() if _is_text(kind)]
        column = self._column(list(rows.features), of_text, of_text)
        if len(rows.column_names) > 1:
            rows = rows.select_columns([column])
        if column != "text":
            rows = rows.rename_column(column, "text")
        return Rows(rows).documents(self.cache_dir)

    def _column(self, columns: list[str], of_text: list[str], possible: list[str]) -> str:
        """The column that holds the text: the one asked for, or `text` if there is one, or the only one that holds text."""
        asked = self.text_column or ("text" if "text" in columns else None)
        if asked is None and len(of_text) == 1:
            logger.info("%s: the text is the column %r, the only one that holds text", shown(self.data), of_text[0])
            return of_text[0]
        if asked in possible:
            return asked
        names, missing = ", ".join(of_text) or "none", asked not in columns
        if asked is None:
            what = "which column is the text? say --text_column" if of_text else "no column holds text"
        else:
            asked = f"--text_column {asked}" if self.text_column else "the column 'text'"
            what = f"{asked}: " + ("there is no such column" if missing else "holds no text, or not only text")
        also = "" if names_hub_dataset(self.data) else "; to learn the file as it stands, say --data_format text"
        raise MiniGPTError(f"{self.data}: {what}; columns of text: {names}{also}")


def _is_text(kind) -> bool:
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def has_split(data: str, split: str) -> bool:
    """Whether `--data_split` can choose this split of it."""
    path = Path(data)
    if names_hub_dataset(data) or is_saved(path):
        return True
    if path.is_dir():
        files, root = files_below(path).files, data
    elif has_magic(data) and not path.exists():
        files, root = files_matching(data).files, folder_of(data)
    else:
        return False
    are_text = all(FORMAT_OF.get(ending_of(file), "text") == "text" for file in files)
    return _has_splits(files, root, are_text) and any(_is_of_split(file, root, split) for file in files)


def _has_splits(files: list[str], root: str, are_text: bool) -> bool:
    """Whether the names of these files may tell splits: of tables, or of text if every name does and one is of `train`.

    A folder `tests` among others is part of a text, such as the source code of a program.
    """
    if not are_text:
        return True
    splits = {split_of(file, root) for file in files}
    return None not in splits and "train" in splits and len(splits) > 1


def _is_of_split(file: str, root: str, split: str) -> bool:
    names = {Path(file).stem.lower(), split_of(file, root), *chain.from_iterable(split_words(file, root))}
    return split.lower() in names


def names_hub_dataset(data: str) -> bool:
    """Whether this is `user/name` or `user/name:config`, and nothing on this disk."""
    name = data.partition(":")[0]
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
        and ending_of(name) not in FORMAT_OF
        and not Path(data).exists()
    )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _unreadable(data: str, error: BaseException) -> MiniGPTError:
    """The error of ours that `datasets` has wrapped, or else one that names what could not be read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnreadableFileError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return MiniGPTError(f"{data}: cannot be read: {_reason(error)}")


def _reason(error: DatasetGenerationError) -> str:
    """What lies under "An error occurred while generating the dataset"."""
    if isinstance(error, DatasetGenerationCastError):
        return "its tables have different columns; give those that are alike, or learn them as text: --data_format text"
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__
    return _first_line(cause)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
