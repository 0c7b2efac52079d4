"""A file -> its bytes, unpacked, or its characters, decoded piece by piece.

In: the name of a regular file. Out: bytes or pieces of text, so that memory is bounded by a piece whatever the length of a
file or line. Nothing is changed on the way, unless `Decoding` says so. Raises `UnreadableFileError`, a `ValueError`, for
bytes that are not text, for a damaged or truncated compressed file, and for one that expands without bound.
"""

import codecs
import gzip
import hashlib
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import pyarrow as pa

from ..errors import UnreadableFileError

# A file that expands more than this many times is refused once it has produced this many bytes. Text compresses about
# 4-fold, logs 20-fold; gzip reaches at most 1,032, zstd 32,000.
MAX_EXPANSION, EXPANSION_CHECKED_ABOVE_BYTES = 100, 100_000_000


class _Xz:
    """The streams of an .xz file. Unlike `lzma.open`, which ends at a damaged header, it reads all or raises an error."""

    def __init__(self, path: str):
        self.file = Path(path).open("rb")  # noqa: SIM115 (closed by `close`)
        self.decompressor: lzma.LZMADecompressor | None = None

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            if self.decompressor is None or self.decompressor.eof:
                packed = self.decompressor.unused_data if self.decompressor else b""
                padding = len(packed) - len(packed := packed.lstrip(b"\0"))  # between streams: a multiple of 4 bytes
                while not packed and (more := self.file.read(1 << 16)):
                    packed = more.lstrip(b"\0")
                    padding += len(more) - len(packed)
                if padding % 4 or (padding and self.decompressor is None):
                    raise EOFError("it is damaged between two streams")
                if not packed:
                    return b""
                self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self.decompressor.needs_input:
                if not (packed := self.file.read(1 << 16)):
                    raise EOFError("it ends in the middle of a stream")
            else:
                packed = b""
            data = self.decompressor.decompress(packed, size)
        return data

    def close(self) -> None:
        self.file.close()


READERS = {
    ".gz": gzip.GzipFile,
    ".xz": _Xz,
    # Unlike `zstandard`, pyarrow reads all frames of a file and reports a truncated one.
    ".zst": lambda file: pa.CompressedInputStream(pa.OSFile(file), "zstd"),
}
COMPRESSED = tuple(READERS)
NEWLINES = ("preserve", "universal")
BYTE_ORDER_MARK = "\ufeff"
# A piece ends after such a line end if it has one: no word of a byte-level BPE tokenizer extends across it.
LINE_END = re.compile(r"\n(?=\S)")
LINE_END_WITHIN = 65_536  # characters before the end of a piece


@dataclass(frozen=True)
class Decoding:
    """How bytes become characters: `encoding` and `errors` as in `bytes.decode`; `newline` is one of `NEWLINES`."""

    encoding: str = "utf-8"
    errors: str = "strict"
    newline: str = "preserve"


def has_changed(name: str) -> UnreadableFileError:
    """The error for a file whose content is not what it was a moment ago."""
    return UnreadableFileError(
        f"{shown(name)}: has changed while it was being read; wait until nothing writes to it, or give a copy"
    )


def shown(name: str) -> str:
    """A file name as it can be written in one line of any output: what is not printable is escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file; its errors name the file."""

    def __init__(self, path: str, name: str, packing: str):
        self.name, self.packed, self.produced = shown(name), Path(path).stat().st_size, 0
        self.stream = READERS[packing](path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UnreadableFileError(f"{self.name}: cannot be read: {str(error) or type(error).__name__}") from error
        self.produced += len(data)
        if self.produced > max(EXPANSION_CHECKED_ABOVE_BYTES, MAX_EXPANSION * self.packed):
            raise UnreadableFileError(
                f"{self.name}: its {self.packed:,} bytes expand more than {MAX_EXPANSION}-fold (to {self.produced:,} "
                "bytes and more); if that is meant, unpack it and give the unpacked file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def packing_of(name: str) -> str:
    """notes.txt.GZ or https://…/notes.txt.gz?x=1 -> .gz; '' for a file that is not compressed."""
    ending = Path(urlparse(name).path if "://" in name else name).suffix.lower()
    return ending if ending in COMPRESSED else ""


def open_bytes(path: str, name: str) -> BinaryIO:
    """Open a file for reading; one whose name ends in .gz, .zst or .xz is unpacked.

    Raises:
        UnreadableFileError: if it cannot be opened.
    """
    try:
        if packing := packing_of(name):
            return io.BufferedReader(_Unpacked(path, name, packing), buffer_size=1 << 16)
        return Path(path).open("rb")
    except OSError as error:
        raise UnreadableFileError(f"{shown(name)}: cannot be read: {error.strerror or error}") from error


def chunks(path: str, name: str, size: int) -> Iterator[bytes]:
    """The bytes of a file, `size` at a time."""
    with open_bytes(path, name) as file:
        while chunk := file.read(size):
            yield chunk


def digest_of(path: str, name: str) -> str:
    """SHA-256 of the bytes of a file, unpacked."""
    digest = hashlib.sha256()
    for chunk in chunks(path, name, 1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def keep(content: Iterable[bytes], folder: Path, ending: str) -> tuple[Path, str]:
    """Write a file under the SHA-256 of its content; return its place and that hash."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
        try:
            for data in content:
                digest.update(data)
                file.write(data)
            file.flush()
            kept = (folder / f"{digest.hexdigest()[:32]}{ending}").absolute()
            Path(file.name).replace(kept)
        except BaseException:
            Path(file.name).unlink()
            raise
    return kept, digest.hexdigest()


@dataclass
class Seen:
    """What a reader came across in a file."""

    byte_order_mark: bool = False
    newlines_converted: int = 0
    zeros: int = 0


def decoded(path: str, name: str, decoding: Decoding, size: int, seen: Seen | None = None) -> Iterator[str]:
    """The text of a file, `size` bytes at a time."""
    decoder = codecs.getincrementaldecoder(decoding.encoding)(decoding.errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True) if decoding.newline == "universal" else None
    seen, fed, is_last, is_first = seen or Seen(), 0, False, True
    source = chunks(path, name, size)
    while not is_last:
        chunk = next(source, b"")
        is_last = not chunk
        fed += len(chunk)
        try:
            text = decoder.decode(chunk, is_last)
        except UnicodeDecodeError as error:
            # `error.object` is what the decoder had kept of the chunks before, and this one.
            place = fed - len(error.object) + error.start
            raise UnreadableFileError(
                f"{shown(name)}: not {decoding.encoding} text: byte {error.object[error.start]:#04x} at position {place}; "
                "name its encoding, e.g. --encoding latin-1, leave this file out, or say --encoding_errors replace"
            ) from error
        except UnicodeError as error:
            raise UnreadableFileError(f"{shown(name)}: not {decoding.encoding} text: {error}") from error
        if newlines is not None:
            seen.newlines_converted += text.count("\r")
            text = newlines.decode(text, is_last)
        if text:
            if is_first:
                seen.byte_order_mark = text.startswith(BYTE_ORDER_MARK)
                is_first = False
            seen.zeros += text.count("\0")
            yield text


def pieces(path: str, name: str, decoding: Decoding, size: int) -> Iterator[str]:
    """The text of a file in pieces of at most `size` characters, which end after a line if one ends near."""
    rest = ""
    for text in decoded(path, name, decoding, max(1, size // 4)):
        rest += text
        while len(rest) > size:
            line_ends = list(LINE_END.finditer(rest, size - min(LINE_END_WITHIN, size // 2), size))
            cut = line_ends[-1].end() if line_ends else size
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
