"""Files: which there are, and what reads them.

In: names and endings. Out: lists of files, and the builder of `datasets` for each ending. None is opened here, but to name
the one that is not text.
"""

import lzma
import sysconfig
from pathlib import Path
from urllib.parse import urlparse

import fsspec
import zstandard

TEXT = (
    ".txt .text .md .rst .tex .log .html .xml .py .pyi .ipynb .js .ts .c .h .cc .cpp .hpp .rs .go .java .kt .rb .php .sh "
    ".sql .lua .r .jl .hs .ml .scala .swift .css .yaml .yml .toml .ini .pgn .fasta .fa"
)
# The one table from a file's ending to the builder of `datasets` that reads it, and that builder's options.
BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    **dict.fromkeys(TEXT.split(), ("text", {})),
    **dict.fromkeys(".jsonl .json .ndjson".split(), ("json", {})),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
FORMATS = ("text", "json", "csv", "parquet", "arrow")
COMPRESSED = (".gz", ".zst", ".xz")  # unpacked by `datasets`, as the ending before says
# Beside tables these are about the data, not part of it.
ABOUT = ("readme", "license", "licence")
# A text file above this size is read by its lines, and so never held in memory whole.
LINES_ABOVE_BYTES = 32_000_000


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://", "hf://"))


def is_large(file: str) -> bool:
    if is_url(file):
        return False
    times = 5 if Path(file).suffix in COMPRESSED else 1  # about what text packs to
    return Path(file).stat().st_size * times > LINES_ABOVE_BYTES


def ending_of(file: str) -> str:
    """notes.TXT -> .txt; https://…/rows.jsonl.gz?x=1 -> .jsonl; README -> ''."""
    path = Path(urlparse(file).path if is_url(file) else file)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def files_matching(pattern: str) -> list[str]:
    """Files that a glob stands for, sorted; `**` is any number of folders."""
    path = Path(pattern)
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(str(file) for file in found if file.is_file())


def files_below(folder: Path, endings=BUILDERS) -> list[str]:
    """All files with these endings, sorted; hidden files and folders are left out."""
    return [
        str(file)
        for file in sorted(folder.rglob("*"))
        if ending_of(str(file)) in endings
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def standard_library() -> list[str]:
    """The .py files of this Python: real text, some megabytes, on every machine.

    Left out are tests, tables, and what describes this very machine.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
    return [
        file
        for file in files_below(folder, (".py",))
        if left_out.isdisjoint(Path(file).relative_to(folder).parts)
        and not Path(file).name.startswith("_sysconfigdata")
    ]


def raise_if_undecodable(files: list[str], encoding: str) -> None:
    """Name the file and the byte that are not text."""
    for file in files:
        if is_url(file):
            continue
        try:
            with fsspec.open(file, "rb", compression="infer") as opened:
                opened.read().decode(encoding)
        except UnicodeDecodeError as error:
            unpack = "unpack it and " if file.endswith(COMPRESSED) else ""
            raise ValueError(
                f"{file}: not {encoding} text: byte {error.object[error.start]:#04x} at position {error.start}; "
                f"name its encoding, e.g. --encoding latin-1, leave this file out, or {unpack}say --encoding_errors replace"
            ) from error
        except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError):
            continue  # broken in another way, which whoever called this tells
