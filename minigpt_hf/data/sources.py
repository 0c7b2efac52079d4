"""What `--data` names -> rows of text, through `datasets`.

In: a file, folder, glob, URL, saved dataset, Hub dataset, `stdlib` or `-`. Out: `Texts`, and those of a validation split of
its own if it has one. It refuses, in one line, what is not there, what has no reader, and what is not text.

A document is a file, if it is text, or a row, if it is a table.
"""

import codecs
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError

from ..network import cache_alone_if_unreachable
from .files import (
    ABOUT,
    BUILDERS,
    COMPRESSED,
    ending_of,
    files_below,
    files_matching,
    is_large,
    is_url,
    raise_if_undecodable,
    standard_library,
)
from .texts import Documents, StreamedDocuments, Texts, index_kept, rows_as_documents, rows_as_one_document

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Source:
    """What to read, and how; the fields are those of `load_corpus`."""

    data: str
    encoding: str
    encoding_errors: str
    split: str | None
    text_column: str | None
    data_format: str | None
    streaming: bool
    cache_dir: Path

    def read(self) -> tuple[Texts, Texts | None]:
        """The text to learn from, and the validation split that comes with it, if one does and no split was asked for."""
        path = Path(self.data)
        if self.streaming and not names_hub_dataset(self.data):
            raise ValueError(f"--streaming reads datasets of the Hub as they arrive; {self.data} is none: leave it out")
        if (path / "prepared.json").is_file():
            raise ValueError(f"{self.data}: is a prepared text, tokens which only training takes; give the text itself")
        try:
            if self.data == "stdlib":
                return self._texts(standard_library(), "text"), None
            if self.data == "-":
                return self._texts([self._standard_input()], self.data_format or "text"), None
            if is_url(self.data):
                return self._of_files([self.data]), None
            if path.is_dir():
                return self._of_saved(path) if is_saved(path) else self._of_folder(path)
            if path.is_file():
                return self._of_files([self.data]), None
            if files := files_matching(self.data):
                return self._of_files(files), None
            if names_hub_dataset(self.data):
                with cache_alone_if_unreachable():
                    return self._of_hub()
        except DatasetGenerationError as error:
            raise ValueError(f"{self.data}: cannot be read: {_reason(error)}") from error
        except (OSError, pa.ArrowException) as error:  # a URL that does not answer, no permission, half a file
            raise ValueError(f"{self.data}: cannot be read: {_first_line(error)}") from error
        raise ValueError(
            f"{self.data}: no such file or folder; give a text file, a table, a folder, a glob, a URL, a Hub dataset "
            "(user/name), `stdlib`, or - for standard input"
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def _of_folder(self, folder: Path) -> tuple[Texts, Texts | None]:
        """All files below it that have a reader; hidden ones are left out."""
        files = files_below(folder)
        if self.data_format is None:
            tables = [file for file in files if BUILDERS[ending_of(file)][0] != "text"]
            if tables:
                files = [file for file in files if not Path(file).stem.lower().startswith(ABOUT)]
            kinds = {BUILDERS[ending_of(file)][0]: ending_of(file) for file in files}
            if len(kinds) > 1:
                raise ValueError(
                    f"{folder}: holds {len(files) - len(tables):,} files of text and {len(tables):,} tables "
                    f"({', '.join(sorted(kinds.values()))}), of which the documents would not be alike; name one kind, "
                    f"--data '{folder}/**/*{ending_of(tables[0])}', or learn all as text: --data_format text"
                )
        if not files:
            raise ValueError(f"{folder}: no text file or table in this folder; looked for {' '.join(BUILDERS)}")
        kept = [file for file in files if Path(file).stem.lower() in VALIDATION_SPLITS]
        rest = [file for file in files if Path(file).stem.lower() not in (*VALIDATION_SPLITS, "test")]
        if not kept or not rest or self.split or self._builder_of(files[0])[0] == "text":
            return self._of_files(files), None
        return self._of_files(rest), self._of_files(kept)

    def _of_files(self, files: list[str]) -> Texts:
        builders = {self._builder_of(file)[0]: file for file in files}
        if len(builders) > 1:
            raise ValueError(
                f"{self.data}: holds files of different kinds ({', '.join(builders.values())}); name one kind"
            )
        return self._texts(files, *self._builder_of(files[0]))

    def _builder_of(self, file: str) -> tuple[str, dict[str, str]]:
        if self.data_format is not None:
            return self.data_format, {}
        ending = ending_of(file)
        if ending and ending not in BUILDERS:
            raise ValueError(
                f"{file}: nothing here reads {ending} files; known are {' '.join(BUILDERS)}, plain or "
                f"{' '.join(COMPRESSED)}; if it is text, say --data_format text"
            )
        return BUILDERS[ending] if ending else ("text", {})

    def _texts(self, files: list[str], builder: str, options: dict[str, str] | None = None) -> Documents:
        """Let `datasets` read files: each is one document, if they are text; each row is one, if they are tables."""
        for file in files:
            if not is_url(file) and not os.access(file, os.R_OK):
                raise ValueError(f"{file}: you may not read this file; change its permissions, or leave it out")
        if builder != "text":
            encoding = {"encoding": self.encoding} if builder in ("csv", "json") else {}
            return self._documents(self._load(builder, files, **encoding, **(options or {})))
        large = [file for file in files if is_large(file)]
        small = [file for file in files if not is_large(file)]
        # The mark that some editors put before the first character is no part of the text.
        read_as = "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding
        decode = {"encoding": read_as, "encoding_errors": self.encoding_errors}
        found = []
        try:
            if small:
                found.append(self._documents(self._load("text", small, sample_by="document", **decode)))
            for file in large:
                lines = self._load("text", [file], sample_by="line", keep_linebreaks=True, **decode)
                found.append(self._documents(lines, rows_as_one_document))
        except DatasetGenerationError:
            # `datasets` hands `encoding_errors` to plain files alone.
            strict = self.encoding_errors == "strict"
            raise_if_undecodable([file for file in files if strict or file.endswith(COMPRESSED)], self.encoding)
            raise
        return joined(found)

    def _load(self, builder: str, files: list[str], **options) -> datasets.Dataset:
        return datasets.load_dataset(builder, data_files={"train": files}, split="train", **options)

    def _standard_input(self) -> str:
        """Kept as a file under the hash of its content, so that the same text is the same corpus again."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--data -: standard input reaches one process of several; write it to a file")
        content = sys.stdin.buffer.read()
        file = self.cache_dir / "stdin" / f"{hashlib.sha256(content).hexdigest()[:32]}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return str(file)

    # -- datasets -----------------------------------------------------------------------------------------------------

    def _of_saved(self, folder: Path) -> tuple[Texts, Texts | None]:
        """A folder that `save_to_disk` wrote."""
        found = datasets.load_from_disk(str(folder))
        splits = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({"train": found})
        return self._of_splits(splits)

    def _of_hub(self) -> tuple[Texts, Texts | None]:
        """`user/name` or `user/name:config`."""
        name, _, config = self.data.partition(":")
        try:
            if not self.streaming:
                if self.split:
                    return self._of_rows(datasets.load_dataset(name, config or None, split=self.split)), None
                return self._of_splits(datasets.load_dataset(name, config or None))
            builder = datasets.load_dataset_builder(name, config or None)
            # Its folder is named after repository, configuration, version and revision.
            identity = " ".join(Path(builder.cache_dir).parts[-4:])
            return self._of_splits(builder.as_streaming_dataset(), identity)
        except (ConnectionError, FileNotFoundError) as error:
            raise ValueError(
                f"{self.data}: is no file or folder here, and cannot be had from the Hub: {_first_line(error)}"
            ) from error

    def _of_splits(self, splits: dict, identity: str = "") -> tuple[Texts, Texts | None]:
        asked = self.split or "train"
        if asked not in splits:
            raise ValueError(f"{self.data}: has no split {asked!r}; say --data_split, one of {', '.join(splits)}")
        own = next((name for name in VALIDATION_SPLITS if name in splits), None) if self.split is None else None
        texts = [self._of_rows(splits[name], f"{identity} {name}") for name in (asked, own) if name is not None]
        return texts[0], texts[1] if own else None

    def _of_rows(self, rows: datasets.Dataset | datasets.IterableDataset, identity: str = "") -> Texts:
        if isinstance(rows, datasets.IterableDataset):
            column = self._column({name: str for name, value in next(iter(rows)).items() if isinstance(value, str)})
            rows = rows.select_columns([column])
            rows = rows if column == "text" else rows.rename_column(column, "text")
            return StreamedDocuments(rows, f"{identity} {column}")
        return self._documents(rows)

    def _documents(self, rows: datasets.Dataset, make=rows_as_documents) -> Documents:
        column = self._column(rows.features)
        if len(rows.column_names) > 1:
            rows = rows.select_columns([column])
        if column != "text":
            rows = rows.rename_column(column, "text")
        return Documents(rows, index_kept(rows, make, self.cache_dir))

    def _column(self, features: dict) -> str:
        """The column that holds the text."""
        of_text = [name for name, kind in features.items() if kind is str or _is_text(kind)]
        asked = self.text_column or ("text" if "text" in of_text else None)
        if asked is None and len(of_text) == 1:
            return of_text[0]
        if asked in of_text:
            return asked
        columns = ", ".join(of_text) or "none"
        if asked is None:
            what = "which column is the text? say --text_column" if of_text else "no column holds text"
        else:
            what = f"--text_column {asked}: " + ("holds no text" if asked in features else "there is no such column")
        also = "" if names_hub_dataset(self.data) else "; to learn the file as it stands, say --data_format text"
        raise ValueError(f"{self.data}: {what}; columns of text: {columns}{also}")


def _is_text(kind) -> bool:
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def joined(found: list[Documents]) -> Documents:
    """Several as one, in order."""
    if len(found) == 1:
        return found[0]
    offset, indices = 0, []
    for one in found:
        index = one.index.copy()
        index["row"] += offset
        indices.append(index)
        offset += len(one.rows)
    return Documents(datasets.concatenate_datasets([one.rows for one in found]), np.concatenate(indices))


def names_hub_dataset(data: str) -> bool:
    """Whether this is `user/name` or `user/name:config`, and nothing on this disk."""
    name = data.partition(":")[0]
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
        and ending_of(name) not in BUILDERS
        and not Path(data).exists()
    )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


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
