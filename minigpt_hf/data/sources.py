"""Read what `--data` names: a file, folder, glob, URL, saved dataset, Hub dataset, `stdlib`, or `-` for standard input.

The result is a `SourceContent`. A document is a text file, or a row of a table.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from glob import has_magic
from itertools import chain, islice
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from ..atomic import DescribedOSError, remove_abandoned, temporary_directory
from ..errors import MiniGPTError, UnreadableFileError
from .cache import cached
from .conversations import has_system_message
from .documents import IndexedDocuments, StreamedDocuments, TableRows, TextFiles
from .files import (
    DOCUMENTATION_NAMES,
    FORMAT_BY_EXTENSION,
    SPLITS,
    TABLE_EXTENSIONS,
    FileSelection,
    Share,
    extension_of,
    files_below,
    files_matching,
    folder_of,
    is_url,
    prepared_folder,
    reason_of_name,
    split_of,
    split_words,
    standard_library,
)
from .hub_access import offline_if_unreachable
from .reading import COMPRESSED_EXTENSIONS, Decoding, printable, store_by_hash
from .tables import INSPECTED_ROWS, large_strings, read_conversations, read_tables, serialized_conversations

logger = logging.getLogger(__name__)

COPIED_BYTES = 1 << 22  # read at a time
SHARDS = "shard-*-of-*"  # names of the folders of shards, see `Share`
SETTINGS_OF_FILES = ("newline", "encoding", "encoding_errors", "data_format")  # without effect on datasets


@dataclass(frozen=True)
class SourceContent:
    """The content of a source.

    Args:
        train: Its documents.
        validation: Its validation split, if it has one and no split was requested.
        note: How many of its files were read, if files were skipped.
        inputs: Identifies the files or rows of which a share was read; equal for all shares.
    """

    train: IndexedDocuments | StreamedDocuments
    validation: IndexedDocuments | StreamedDocuments | None = None
    note: str = ""
    inputs: str = ""


@dataclass(frozen=True)
class Source:
    """A single source and how to read it. For the fields see `load_corpus`.

    Args:
        names: Names to display instead of paths; filled while reading.
        inputs: Describes the files or rows of which a share is read; filled while reading.
        remote: What the file system knows about each remote file; filled while reading.
    """

    data: str
    decoding: Decoding
    split: str | None
    text_column: str | None
    data_format: str | None
    streaming: bool
    cache_dir: Path
    chat: bool = False
    system: str | None = None
    share: Share | None = None
    names: dict[str, str] = field(default_factory=dict)
    inputs: list[list] = field(default_factory=list)
    remote: dict[str, dict] = field(default_factory=dict)

    def read(self) -> SourceContent:
        """Read the documents, or their index, or those of a share.

        Raises:
            MiniGPTError: if the source does not exist, its format is unknown, or it cannot be read.
        """
        content = self._read_source()
        if self.chat and self.system is not None and not has_system_message(content.train, self.system):
            logger.warning(
                "--system has no effect on %s: every conversation has a system message of its own", printable(self.data)
            )
        return replace(content, inputs=hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest())

    def _read_source(self) -> SourceContent:
        if not self.data.strip():
            raise MiniGPTError(
                f"data is {self.data!r}, which is empty: specify a file, a folder (`.` for this one), a URL, a Hub dataset, "
                "`stdlib`, or - for standard input"
            )
        path = Path(self.data)
        if self.streaming and self.chat:
            raise MiniGPTError("--streaming is not supported with --chat: omit it")
        if self.streaming and not names_hub_dataset(self.data):
            raise MiniGPTError(f"--streaming requires a dataset of the Hub, and {self.data} is not one: omit it")
        if prepared_folder(self.data):
            raise MiniGPTError(
                f"{self.data}: is a prepared text, which only training accepts, and not in a mixture; specify the original "
                "text instead"
            )
        if path.is_dir() and next(path.glob(f"{SHARDS}/shard.json"), None):
            raise MiniGPTError(
                f"{self.data}: has shards that are not merged: run `minigpt tokenize --merge {self.data}`, and train with it"
            )
        try:
            if self.data == "stdlib":
                if path.exists():
                    logger.warning(
                        "stdlib is the Python standard library; for the file or folder of that name: ./stdlib"
                    )
                return self._read_files(standard_library())
            if self.data == "-":
                return self._read_files([self._stored("standard input", sys.stdin.buffer.read)])
            if is_url(self.data):
                return self._read_urls()
            if path.is_dir():
                if is_saved_dataset(path):
                    return self._read_saved_dataset(path)
                return self._read_folder(str(path), files_below(path, self._extensions))
            if os.path.lexists(path):
                if self.data.endswith(os.sep):
                    raise MiniGPTError(f"{self.data}: is a file, not a folder; remove the trailing {os.sep}")
                return self._read_files([self._regular_file(path)])
            if (selection := files_matching(self.data)).files:
                return self._read_selection(
                    selection, folder_of(self.data), "interpreted as a pattern, because no file has this name: "
                )
            if names_hub_dataset(self.data):
                with offline_if_unreachable():
                    return self._read_hub_dataset()
        except (UnreadableFileError, DescribedOSError):  # the latter: the cache cannot be written, e.g. on a full disk
            raise
        except ImportError as error:  # a package that `fsspec` needs for a protocol is missing
            raise MiniGPTError(f"{self.data}: cannot be read: {_first_line(error)}") from error
        except DatasetGenerationError as error:
            raise _unwrapped(self.data, error) from error
        except (OSError, pa.ArrowException) as error:  # e.g. an unreachable URL, missing permissions, a truncated file
            raise MiniGPTError(f"{self.data}: cannot be read: {_first_line(error)}") from error
        raise MiniGPTError(
            f"{self.data}: no such file or folder; specify a text file, a table, a folder, a glob, a URL, a Hub dataset "
            "(user/name), `stdlib`, or - for standard input"
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def _read_folder(self, folder: str, selection: FileSelection) -> SourceContent:
        """Read the files of known formats below a folder, or all files if `data_format` is given."""
        formats = {file: self._format_of(file) for file in selection.files}
        if set(formats.values()) - {"text"}:
            selection.filter(
                lambda file: not Path(file).stem.lower().startswith(DOCUMENTATION_NAMES), "named README or LICENSE"
            )
        tables = [file for file in selection.files if formats[file] != "text"]
        extensions = {formats[file]: extension_of(file) for file in selection.files}
        if len(extensions) > 1:
            texts = len(selection.files) - len(tables)
            raise MiniGPTError(
                f"{folder}: contains {f'{texts:,} text files and ' if texts else ''}{len(tables):,} tables "
                f"({', '.join(sorted(extensions.values()))}), whose documents differ in kind; select one format with "
                f"--data '{folder}/**/*{extension_of(tables[0])}', or read all files as text with --data_format text"
            )
        if not selection.files:
            skipped = (
                f" ({selection.skipped_summary}); --data_format text reads every file" if selection.skipped else ""
            )
            raise MiniGPTError(
                f"{folder}: no text file or table in this folder; known extensions: "
                f"{' '.join(FORMAT_BY_EXTENSION)}{skipped}"
            )
        return self._read_selection(selection, folder)

    def _read_selection(self, selection: FileSelection, root: str, note: str = "") -> SourceContent:
        """Read the files of a folder or glob.

        If their names indicate splits, the files of the validation split are held out and those of the test split skipped.

        Args:
            root: The folder below which the names of files and folders indicate splits.
            note: Start of the logged summary.
        """
        all_text = all(self._format_of(file) == "text" for file in selection.files)
        if not _names_indicate_splits(selection.files, root, all_text):
            self._report(selection, note)
            return self._read_files(selection.files, selection)
        if self.split:
            requested = {file for file in selection.files if _is_of_split(file, root, self.split)}
            if not requested:
                stems = sorted({printable(Path(file).stem) for file in selection.files})
                raise MiniGPTError(
                    f"{self.data}: has no file for --data_split {self.split}; there are {', '.join(stems)}"
                )
            selection.filter(requested.__contains__, "of other splits")
            self._report(selection, note)
            return SourceContent(self._read(selection.files), note=selection.note)
        splits = {file: split_of(file, root) for file in selection.files}
        held_out = []
        if not {"validation", "test"}.issuperset(splits.values()):  # otherwise nothing would be left for training
            selection.filter(lambda file: splits[file] != "test", "of the test split")
            held_out = [file for file in selection.files if splits[file] == "validation"]
        self._report(selection, note)
        if held_out:
            names = printable(os.path.relpath(held_out[0], root)) + ", …" * (len(held_out) > 1)
            logger.info("%s: %s files of the validation split: %s", printable(self.data), len(held_out), names)
        is_held_out = set(held_out).__contains__
        train = self._read([file for file in selection.files if not is_held_out(file)])
        return SourceContent(train, self._read(held_out) if held_out else None, selection.note)

    def _read_files(self, files: list[str], selection: FileSelection | None = None) -> SourceContent:
        if self.split:
            raise MiniGPTError(
                f"--data_split {self.split}: only datasets have splits, and {printable(self.data)} is not one; omit it"
            )
        return SourceContent(self._read(files), note=selection.note if selection else "")

    def _report(self, selection: FileSelection, note: str = "") -> None:
        """Log how many files are read, and which are skipped."""
        skipped = f"; {selection.skipped_summary}" if selection.skipped.total() else ""
        hint = "; --data_format text reads every file that is not hidden" if selection.has_other_extensions else ""
        logger.info("%s: %s%s%s%s", printable(self.data), note, selection.summary, skipped, hint)

    @property
    def _extensions(self) -> Iterable[str] | None:
        """Extensions of the files to read in a folder; None for all."""
        return FORMAT_BY_EXTENSION if self.data_format is None else None

    def _format_of(self, file: str) -> str:
        if self.data_format is not None:
            return self.data_format
        extension = extension_of(name := self.names.get(file, file))
        if extension and extension not in FORMAT_BY_EXTENSION:
            raise MiniGPTError(
                f"{name}: {extension} files are not supported; known extensions: {' '.join(FORMAT_BY_EXTENSION)}, "
                f"uncompressed or {' '.join(COMPRESSED_EXTENSIONS)}; if it is text, use --data_format text"
            )
        return FORMAT_BY_EXTENSION[extension] if extension else "text"

    def _read(self, files: list[str]) -> IndexedDocuments:
        """Read files of one format: each text file, or each row of a table, is a document."""
        formats = {self._format_of(file): file for file in files}
        if len(formats) > 1:
            raise MiniGPTError(
                f"{self.data}: contains files of different formats ({', '.join(formats.values())}); select one format"
            )
        for file in files:
            if file not in self.remote and not os.access(file, os.R_OK):
                raise MiniGPTError(f"{file}: no permission to read this file; change its permissions or exclude it")
        (data_format,) = formats
        files, is_share_of_rows = self._share_of_files(files)
        files = self._fetched(files)
        if data_format == "text" and self.chat:
            raise MiniGPTError(
                f"{self.data}: is text, and --chat requires conversations, the rows of a table "
                f"({' '.join(TABLE_EXTENSIONS)}); give such a file"
            )
        if data_format == "text":
            if self.text_column:
                logger.warning("--text_column %s has no effect: %s is text", self.text_column, printable(self.data))
            return TextFiles(tuple(files), self.decoding, self.names).documents(self.cache_dir)
        subject = f"tables such as {printable(self.names.get(files[0], files[0]))}" if files else "tables"
        is_binary = data_format in ("parquet", "arrow")
        self._report_unused(subject, "newline", *(("encoding", "encoding_errors") if is_binary else ()))
        if self.chat:
            if self.text_column:
                raise MiniGPTError(f"--text_column {self.text_column}: conversations have fixed columns; omit it")
            rows = read_conversations(data_format, files, self.names, self.decoding, self.cache_dir, self.system)
        else:
            if not files:  # all files are in other shares
                return TextFiles((), self.decoding).documents(self.cache_dir)
            rows = read_tables(
                data_format, files, self.names, self.decoding, self.cache_dir, self._choose_column, self.text_column
            )
        return (self._share_of(rows) if is_share_of_rows else TableRows(rows)).documents(self.cache_dir)

    def _report_unused(self, subject: str, *names: str) -> None:
        """Log which of the settings `names` are given, although they have no effect on `subject`."""
        given = {
            "newline": self.decoding.newline != "preserve",
            "encoding": self.decoding.encoding != "utf-8",
            "encoding_errors": self.decoding.errors != "strict",
            "data_format": self.data_format is not None,
        }
        for name in names:
            if given[name]:
                logger.warning("--%s has no effect on %s", name, subject)

    def _share_of_files(self, files: list[str]) -> tuple[list[str], bool]:
        """Return the files of the share, and whether it is a share of the rows of all files instead.

        Raises:
            MiniGPTError: if there are fewer text files than shares.
        """
        if self.share is None:
            return files, False
        sizes = [
            self.remote[file]["size"] if file in self.remote else os.path.getsize(file)  # noqa: PTH202 (fast)
            for file in files
        ]
        names = [os.path.basename(self.names.get(file, file)) for file in files]  # noqa: PTH119 (fast)
        self.inputs.append([names, sizes])
        if len(files) >= self.share.count:
            return self.share.of_files(files, sizes), False
        if self._format_of(files[0]) == "text":
            raise MiniGPTError(
                f"{self.data}: has {len(files):,} text {'files' if len(files) > 1 else 'file'}, which are not divided, "
                f"and cannot be shared by {self.share.count:,} shards; use at most {len(files):,}, or give a table with a "
                "document per row"
            )
        return files, True

    def _share_of(self, rows: datasets.Dataset) -> TableRows:
        """Return the rows of the share, without copying them."""
        if self.share is None:
            return TableRows(rows)
        positions = self.share.of_rows(len(rows))
        return TableRows(rows.select(positions), positions.start)

    def _regular_file(self, path: Path) -> str:
        """Return the file to read: the path itself, or a copy of a pipe inherited by this process, as from `<(command)`."""
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return self.data
        if stat.S_ISFIFO(mode) and self.data.startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
            with path.open("rb") as file:
                return self._stored(self.data, file.read)
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise MiniGPTError(
            f"{self.data}: is a {kinds.get(stat.S_IFMT(mode), 'special file')}, not a regular file; write its content to a "
            "file, or pipe it to standard input: … | minigpt … --data -"
        )

    def _stored(self, name: str, read: Callable[[int], bytes]) -> str:
        """Store a pipe as a file named by the hash of its content, because text is read several times."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MiniGPTError(
                f"--data {self.data}: {name} is available to only one of several processes; write it to a file"
            )
        path = store_by_hash(iter(lambda: read(1 << 20), b""), self.cache_dir / "stdin", ".txt")
        self.names[str(path)] = name
        return str(path)

    def _read_urls(self) -> SourceContent:
        """Read a URL: a file, or for other protocols than HTTP a folder or pattern, like local ones."""
        if self.data.startswith(("http://", "https://")):
            file_system, path = fsspec.core.url_to_fs(self.data)
            return self._read_files([self._copied(self.data, file_system.info(path))])
        found = remote_files(self.data, self._extensions)
        if not found.selection.files:
            raise MiniGPTError(
                f"{self.data}: no text file or table there; known extensions: {' '.join(FORMAT_BY_EXTENSION)}"
            )
        self.remote.update(found.infos)
        if found.kind == "folder":
            return self._read_folder(found.root, found.selection)
        if found.kind == "pattern":
            return self._read_selection(found.selection, found.root)
        return self._read_files(found.selection.files)

    def _fetched(self, files: list[str]) -> list[str]:
        """Return the copies of remote files in the cache, and local files unchanged."""
        if not files or files[0] not in self.remote:
            return files
        if self.data.startswith("hf://"):
            return self._downloaded(files)
        return [self._copied(url, self.remote[url]) for url in files]

    def _downloaded(self, urls: list[str]) -> list[str]:
        """Download files of the Hub into its cache."""
        paths = [str(path) for path in datasets.DownloadManager().download(urls)]
        self.names.update(zip(paths, urls, strict=True))
        return paths

    def _copied(self, url: str, info: dict) -> str:
        """Copy a remote file to the cache, unless an intact copy of the same version, stated by an ETag, is there.

        Args:
            info: What the file system knows about it.
        """
        version, folder = info.get("ETag") or info.get("etag"), self.cache_dir / "downloads"
        fetch = self._download if url.startswith(("http://", "https://")) else _copy
        if version is None:  # an earlier copy may be outdated
            remove_abandoned(folder)
            target = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
            with temporary_directory(folder) as temporary:
                fetch(url, temporary / "file")
                (temporary / "file").replace(target)
        else:
            key = hashlib.sha256(json.dumps(["verified", url, info["size"], version]).encode()).hexdigest()[:32]
            target = cached(
                folder / key,
                lambda copy: fetch(url, copy / "file"),
                lambda copy: copy / "file",
                self.cache_dir,
                "copy of a remote file",
            )
        self.names[str(target)] = url
        return str(target)

    def _download(self, url: str, target: Path) -> None:
        """Download a URL."""
        with temporary_directory(self.cache_dir / "downloads") as temporary:
            config = datasets.DownloadConfig(cache_dir=str(temporary), force_download=True)
            try:
                path = Path(datasets.DownloadManager(download_config=config).download(url))
            except Exception as error:
                from aiohttp import ClientError  # slow to import

                if isinstance(error, ClientError):  # e.g. the connection was lost; not an `OSError`
                    raise OSError(str(error)) from error
                raise
            # URLs of the Hub are downloaded into its cache.
            (shutil.move if path.is_relative_to(temporary) else shutil.copyfile)(path, target)

    # -- datasets -----------------------------------------------------------------------------------------------------

    def _read_saved_dataset(self, folder: Path) -> SourceContent:
        """Read a folder written by `save_to_disk`."""
        self._report_unused(f"the dataset {printable(self.data)}", *SETTINGS_OF_FILES)
        try:
            # A dataset in memory would not state its files, which are checked below.
            dataset = datasets.load_from_disk(str(folder), keep_in_memory=False)
        except (LookupError, TypeError, ValueError) as error:  # it has no rows, or its JSON files are damaged
            raise MiniGPTError(
                f"{self.data}: cannot be read: a split of this saved dataset has no rows, or a file is damaged "
                f"({_first_line(error)}); save it again"
            ) from error
        splits = dataset if isinstance(dataset, datasets.DatasetDict) else datasets.DatasetDict({"train": dataset})
        for split in splits.values():  # `state.json` and `dataset_dict.json` may name any path
            for file in (Path(each["filename"]).absolute() for each in split.cache_files):
                if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder.absolute())):
                    raise MiniGPTError(
                        f"{self.data}: its JSON files name a file outside the folder, {printable(str(file))}; save it again"
                    )
        return self._read_splits(splits)

    def _read_hub_dataset(self) -> SourceContent:
        """Read `user/name` or `user/name:config`."""
        name, _, config = self.data.partition(":")
        self._report_unused(f"the dataset {printable(self.data)}", *SETTINGS_OF_FILES)
        try:
            if not self.streaming:
                if self.split:
                    return SourceContent(
                        self._read_dataset(datasets.load_dataset(name, config or None, split=self.split))
                    )
                return self._read_splits(datasets.load_dataset(name, config or None))
            builder = datasets.load_dataset_builder(name, config or None)
            # The folder is named after repository, configuration, version and revision.
            identity = " ".join(Path(builder.cache_dir).parts[-4:])
            return self._read_splits(builder.as_streaming_dataset(), identity)
        except (ConnectionError, FileNotFoundError) as error:
            raise MiniGPTError(
                f"{self.data}: no such file or folder, and it cannot be loaded from the Hub: {_first_line(error)}"
            ) from error
        except (MiniGPTError, DatasetGenerationError):
            raise
        except ValueError as error:  # e.g. an unknown split, or no configuration given for a dataset with several
            raise MiniGPTError(f"{self.data}: cannot be loaded: {' '.join(str(error).split())}") from error

    def _read_splits(self, splits: dict, identity: str = "") -> SourceContent:
        requested = self.split or "train"
        if requested not in splits:
            raise MiniGPTError(
                f"{self.data}: has no split {requested!r}; use --data_split with one of {', '.join(splits)}"
            )
        validation = next((name for name in SPLITS["validation"] if name in splits), None) if not self.split else None
        unread = [name for name in splits if name not in (requested, validation)]
        if unread and not self.split:
            logger.info("%s: splits that are not read: %s", printable(self.data), ", ".join(unread))
        train = self._read_dataset(splits[requested], f"{identity} {requested}")
        if validation is None:
            return SourceContent(train)
        return SourceContent(train, self._read_dataset(splits[validation], f"{identity} {validation}"))

    def _read_dataset(
        self, rows: datasets.Dataset | datasets.IterableDataset, identity: str = ""
    ) -> IndexedDocuments | StreamedDocuments:
        """Return the text column of a dataset as documents.

        Args:
            identity: Identifies the content of a streamed dataset.
        """
        if isinstance(rows, datasets.IterableDataset):
            column = self._choose_column(*self._streamed_columns(rows))
            if self.share is not None:
                self.inputs.append([identity, rows.num_shards])
                if rows.num_shards < self.share.count:
                    raise MiniGPTError(
                        f"{self.data}: is streamed from {rows.num_shards:,} files, which are not divided, and cannot be "
                        f"shared by {self.share.count:,} shards; use at most {rows.num_shards:,}, or omit --streaming"
                    )
                rows = rows.shard(self.share.count, self.share.index, contiguous=True)
                identity += f" {self.share}"
            rows = rows.select_columns([column])
            rows = rows if column == "text" else rows.rename_column(column, "text")
            return StreamedDocuments(rows, f"{identity} {column}")
        if self.chat:
            rows = serialized_conversations(rows, self.data, self.system, self.cache_dir)
            return TableRows(rows).documents(self.cache_dir)
        text_columns = [name for name, feature in rows.features.items() if _is_text(feature)]
        column = self._choose_column(list(rows.features), text_columns, text_columns)
        if len(rows.column_names) > 1:
            rows = rows.select_columns([column])
        if column != "text":
            rows = rows.rename_column(column, "text")
        if rows.features["text"].dtype == "string_view":  # pyarrow can neither measure nor select such values
            rows = large_strings(rows, self.data, self.cache_dir)
        self.inputs.append([column, len(rows)])
        return self._share_of(rows).documents(self.cache_dir)

    def _streamed_columns(self, rows: datasets.IterableDataset) -> tuple[list[str], list[str], list[str]]:
        """Return the arguments of `_choose_column`, from the first rows: any of them may have no text."""
        has_text: dict[str, bool] = {}
        for row in islice(rows, INSPECTED_ROWS):
            for name, value in row.items():
                has_text[name] = has_text.get(name, False) or isinstance(value, str)
            if has_text.get(self.text_column or "text"):
                break
        text_columns = [name for name, is_text in has_text.items() if is_text]
        return list(has_text), text_columns, text_columns

    def _choose_column(self, columns: list[str], text_columns: list[str], allowed: list[str]) -> str:
        """Return the requested text column, or else `text` if it exists, or else the only column of text.

        Args:
            columns: Names of all columns.
            text_columns: Names of the columns that appear to contain text.
            allowed: Names of the columns that may be requested.
        """
        requested = self.text_column or ("text" if "text" in columns else None)
        if requested is None and len(text_columns) == 1:
            logger.info("%s: using the column %r, the only column of text", printable(self.data), text_columns[0])
            return text_columns[0]
        if requested in allowed:
            return requested
        names, is_missing = ", ".join(text_columns) or "none", requested not in columns
        if requested is None:
            fault = (
                "several columns contain text; choose one with --text_column"
                if text_columns
                else "no column contains text"
            )
        else:
            requested = f"--text_column {requested}" if self.text_column else "the column 'text'"
            fault = f"{requested}: " + (
                "there is no such column" if is_missing else "contains values that are not text"
            )
        hint = "" if names_hub_dataset(self.data) else "; to read the file as plain text, use --data_format text"
        raise MiniGPTError(f"{self.data}: {fault}; columns of text: {names}{hint}")


def _copy(url: str, target: Path) -> None:
    """Copy a file of an object store."""
    with fsspec.open(url, "rb", compression=None) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, COPIED_BYTES)


@dataclass(frozen=True)
class RemoteFiles:
    """The files that a URL of an object store, or of the Hub, names.

    Args:
        kind: "file", "folder" or "pattern".
        root: The folder below which the names of files and folders indicate splits.
        infos: What the file system knows about each file, by URL.
    """

    kind: str
    root: str
    selection: FileSelection
    infos: dict[str, dict]


def remote_files(url: str, extensions: Iterable[str] | None) -> RemoteFiles:
    """List the files that a URL names.

    Args:
        extensions: Extensions to select in a folder; None for all files.
    """
    file_system, path = fsspec.core.url_to_fs(url)
    kind = "pattern" if has_magic(path) else "folder" if file_system.isdir(path) else "file"
    if kind == "pattern":
        found = file_system.glob(path, detail=True)
    else:
        found = file_system.find(path, detail=True) if kind == "folder" else {path: file_system.info(path)}

    def as_url(name: str) -> str:
        return f"{url.partition('://')[0]}://{name.lstrip('/')}"

    root = folder_of(as_url(path)) if kind == "pattern" else as_url(path)

    def is_hidden(name: str) -> bool:
        return any(part.startswith(".") for part in Path(os.path.relpath(as_url(name), root)).parts)

    includes_hidden = kind == "file" or (kind == "pattern" and is_hidden(path))
    selection, infos = FileSelection(), {}
    for name, info in sorted(found.items()):
        if info["type"] != "file":
            continue
        reason = reason_of_name(name, extensions) if kind == "folder" else None
        if is_hidden(name) and not includes_hidden:
            reason = "hidden"
        if reason:
            selection.skipped[reason] += 1
        else:
            selection.files.append(as_url(name))
            infos[as_url(name)] = info
    return RemoteFiles(kind, root, selection, infos)


def _is_text(feature) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def has_split(data: str, split: str) -> bool:
    """Whether `--data_split` can select this split of a source."""
    path = Path(data)
    if names_hub_dataset(data) or is_saved_dataset(path):
        return True
    if is_url(data) and not data.startswith(("http://", "https://")):
        try:
            remote = remote_files(data, FORMAT_BY_EXTENSION)
        except (OSError, ImportError):  # reading it reports the error
            return False
        if remote.kind == "file":
            return False
        files, root = remote.selection.files, remote.root
    elif path.is_dir():
        files, root = files_below(path).files, data
    elif has_magic(data) and not path.exists():
        files, root = files_matching(data).files, folder_of(data)
    else:
        return False
    all_text = all(FORMAT_BY_EXTENSION.get(extension_of(file), "text") == "text" for file in files)
    return _names_indicate_splits(files, root, all_text) and any(_is_of_split(file, root, split) for file in files)


def _names_indicate_splits(files: list[str], root: str, all_text: bool) -> bool:
    """Whether the names of files may indicate splits: always for tables; for text if every name does and one is `train`.

    Otherwise a folder `tests` among others, as in the source code of a program, would be taken for a split.
    """
    if not all_text:
        return True
    splits = {split_of(file, root) for file in files}
    return None not in splits and "train" in splits and len(splits) > 1


def _is_of_split(file: str, root: str, split: str) -> bool:
    names = {Path(file).stem.lower(), split_of(file, root), *chain.from_iterable(split_words(file, root))}
    return split.lower() in names


def names_hub_dataset(data: str) -> bool:
    """Whether `data` has the form `user/name` or `user/name:config` and is not a local file or folder."""
    name = data.partition(":")[0]
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
        and extension_of(name) not in FORMAT_BY_EXTENSION
        and not Path(data).exists()
    )


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _unwrapped(data: str, error: BaseException) -> MiniGPTError:
    """Return the `UnreadableFileError` that `datasets` has wrapped, or else an error with the underlying reason."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnreadableFileError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return MiniGPTError(f"{data}: cannot be read: {_reason(error)}")


def _reason(error: DatasetGenerationError) -> str:
    """Return the innermost cause of "An error occurred while generating the dataset"."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    if isinstance(cause, CastError):
        return "its tables have different columns; select tables with the same columns, or use --data_format text"
    return _first_line(cause)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
