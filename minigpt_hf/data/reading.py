"""Read a file as decompressed bytes or as decoded text, in chunks.

Memory is bounded by the size of a chunk, whatever the length of a file or line. The content is unchanged unless `Decoding`
requests a conversion. `UnreadableFileError` is raised for bytes that cannot be decoded, for damaged or truncated compressed
files, and for files that expand excessively.
"""

import codecs
import gzip
import hashlib
import io
import lzma
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urlparse

import pyarrow as pa

from ..errors import UnreadableFileError

# A file that expands by more than this factor is rejected once it has produced this many bytes. Text compresses about
# 4-fold and logs 20-fold; the maximum of gzip is 1,032, of zstd about 32,000.
MAX_EXPANSION, EXPANSION_CHECKED_ABOVE_BYTES = 100, 100_000_000


class _ByteReader(Protocol):
    """Reads the decompressed bytes of a file."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class _XzReader:
    """All streams of an .xz file. Unlike `lzma.open`, which silently stops at a damaged header, it raises an error."""

    def __init__(self, path: str):
        self.file = Path(path).open("rb")  # noqa: SIM115 (closed by `close`)
        self.decompressor: lzma.LZMADecompressor | None = None

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            if self.decompressor is None or self.decompressor.eof:
                compressed = self.decompressor.unused_data if self.decompressor else b""
                # Streams may be separated by zero bytes, a multiple of 4.
                padding = len(compressed) - len(compressed := compressed.lstrip(b"\0"))
                while not compressed and (more := self.file.read(1 << 16)):
                    compressed = more.lstrip(b"\0")
                    padding += len(more) - len(compressed)
                if padding % 4 or (padding and self.decompressor is None):
                    raise EOFError("it is damaged between two streams")
                if not compressed:
                    return b""
                self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self.decompressor.needs_input:
                if not (compressed := self.file.read(1 << 16)):
                    raise EOFError("it ends in the middle of a stream")
            else:
                compressed = b""
            data = self.decompressor.decompress(compressed, size)
        return data

    def close(self) -> None:
        self.file.close()


DECOMPRESSORS: dict[str, Callable[[str], _ByteReader]] = {
    ".gz": gzip.GzipFile,
    ".xz": _XzReader,
    # Unlike `zstandard`, pyarrow reads all frames of a file and reports a truncated one.
    ".zst": lambda file: pa.CompressedInputStream(pa.OSFile(file), "zstd"),
}
COMPRESSED_EXTENSIONS = tuple(DECOMPRESSORS)
NEWLINES = ("preserve", "universal")
# What happens to bytes that cannot be decoded, by the value of `Decoding.errors`.
UNDECODABLE = {"replace": "replaced by U+FFFD", "ignore": "dropped"}
BYTE_ORDER_MARK = "\ufeff"
LINE_END_SEARCH_CHARACTERS = 65_536  # before the maximum end of a chunk


@dataclass(frozen=True)
class Decoding:
    """How bytes are decoded: `encoding` and `errors` as in `bytes.decode`; `newline` is one of `NEWLINES`."""

    encoding: str = "utf-8"
    errors: str = "strict"
    newline: str = "preserve"

    @property
    def preserves_bytes(self) -> bool:
        """Whether the UTF-8 encoding of the text is the content of the file."""
        return (codecs.lookup(self.encoding).name, self.errors, self.newline) == ("utf-8", "strict", "preserve")


def changed_file_error(name: str) -> UnreadableFileError:
    """Return the error for a file whose content has changed since it was indexed."""
    return UnreadableFileError(
        f"{printable(name)}: changed while it was being read; wait until nothing writes to it, or use a copy"
    )


def printable(name: str) -> str:
    """Escape the unprintable characters of a file name, so that it fits into one line of output."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file. Errors state the name of the file."""

    def __init__(self, path: str, name: str, compression: str):
        self.name, self.compressed_size, self.produced = printable(name), Path(path).stat().st_size, 0
        self.stream = DECOMPRESSORS[compression](path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UnreadableFileError(f"{self.name}: cannot be read: {str(error) or type(error).__name__}") from error
        self.produced += len(data)
        if self.produced > max(EXPANSION_CHECKED_ABOVE_BYTES, MAX_EXPANSION * self.compressed_size):
            raise UnreadableFileError(
                f"{self.name}: its {self.compressed_size:,} bytes expand more than {MAX_EXPANSION}-fold (to more than "
                f"{self.produced:,} bytes); if this is intended, decompress it and specify the decompressed file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def path_of(name: str) -> str:
    """Return the path in a URL, or the name of a local file.

    In a name of an object store, `#` and `?` are ordinary characters; only a version follows `?`.
    """
    if name.startswith(("http://", "https://")):
        return urlparse(name).path
    return name.partition("?versionId=")[0] if "://" in name else name


def compression_of(name: str) -> str:
    """Return the compression extension: notes.txt.GZ or https://…/notes.txt.gz?x=1 -> .gz; '' if not compressed."""
    extension = os.path.splitext(path_of(name))[1].lower()  # noqa: PTH122 (fast)
    return extension if extension in COMPRESSED_EXTENSIONS else ""


def open_bytes(path: str, name: str) -> BinaryIO:
    """Open a file for reading bytes, decompressed if its name ends in .gz, .zst or .xz.

    Args:
        name: Name to display, whose extension determines the compression.

    Raises:
        UnreadableFileError: if it cannot be opened.
    """
    try:
        if compression := compression_of(name):
            return io.BufferedReader(_Decompressed(path, name, compression), buffer_size=1 << 16)
        return open(path, "rb")  # noqa: PTH123 (a `Path` for each of many files takes as long as reading it)
    except OSError as error:
        raise UnreadableFileError(f"{printable(name)}: cannot be read: {error.strerror or error}") from error


def byte_chunks(path: str, name: str, size: int) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, `size` bytes at a time."""
    with open_bytes(path, name) as file:
        while chunk := file.read(size):
            yield chunk


def content_sha256(path: str, name: str) -> str:
    """Return the SHA-256 of the decompressed bytes of a file."""
    digest = hashlib.sha256()
    for chunk in byte_chunks(path, name, 1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def store_by_hash(content: Iterable[bytes], folder: Path, extension: str) -> Path:
    """Write a file whose name is the SHA-256 of its content, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
        try:
            for data in content:
                digest.update(data)
                file.write(data)
            file.flush()
            target = (folder / f"{digest.hexdigest()[:32]}{extension}").absolute()
            Path(file.name).replace(target)
        finally:
            Path(file.name).unlink(missing_ok=True)  # after an error; otherwise it has been renamed
    return target


@dataclass
class DecodingStatistics:
    """What was found while decoding a file.

    Attributes:
        byte_order_mark: Whether the text starts with U+FEFF.
        newlines_converted: Number of CRLF and CR line endings converted to LF.
        zeros: Number of U+0000 characters.
        undecodable: Number of bytes that were replaced or dropped because they cannot be decoded.
    """

    byte_order_mark: bool = False
    newlines_converted: int = 0
    zeros: int = 0
    undecodable: int = 0


class _Undecodable(threading.local):
    """Number of bytes that the error handlers below have replaced or dropped in this thread."""

    count = 0


_undecodable = _Undecodable()


def _counting(errors: str) -> Callable[[UnicodeError], tuple[str | bytes, int]]:
    handler = codecs.lookup_error(errors)

    def handle(error: UnicodeError) -> tuple[str | bytes, int]:
        if isinstance(error, UnicodeDecodeError):
            _undecodable.count += error.end - error.start
        return handler(error)

    return handle


COUNTING_HANDLERS = {errors: f"minigpt_hf.{errors}" for errors in UNDECODABLE}
for _errors, _name in COUNTING_HANDLERS.items():
    codecs.register_error(_name, _counting(_errors))


def describe_undecodable(decoding: Decoding, number: int) -> str:
    """Return e.g. "bytes that are not utf-8 text (7 dropped)"."""
    return f"bytes that are not {decoding.encoding} text ({number:,} {UNDECODABLE[decoding.errors]})"


def decoded(
    path: str,
    name: str,
    decoding: Decoding,
    size: int,
    statistics: DecodingStatistics | None = None,
    digest: "hashlib._Hash | None" = None,
) -> Iterator[str]:
    """Yield the text of a file, decoding `size` bytes at a time.

    Args:
        statistics: Updated in place.
        digest: Updated with the UTF-8 encoding of the text.

    Raises:
        UnreadableFileError: naming the byte and its position, if the file cannot be decoded.
    """
    decoder = codecs.getincrementaldecoder(decoding.encoding)(COUNTING_HANDLERS.get(decoding.errors, decoding.errors))
    newlines = io.IncrementalNewlineDecoder(None, translate=True) if decoding.newline == "universal" else None
    statistics = statistics or DecodingStatistics()
    preserves_bytes = decoding.preserves_bytes
    consumed, is_last, is_first = 0, False, True
    source = byte_chunks(path, name, size)
    while not is_last:
        chunk = next(source, b"")
        is_last = not chunk
        consumed += len(chunk)
        undecodable = _undecodable.count
        try:
            text = decoder.decode(chunk, is_last)
        except UnicodeDecodeError as error:
            # `error.object` is this chunk, preceded by bytes that the decoder buffered from earlier chunks.
            position = consumed - len(error.object) + error.start
            raise UnreadableFileError(
                f"{printable(name)}: not {decoding.encoding} text: byte {error.object[error.start]:#04x} at position "
                f"{position}; specify its encoding, e.g. --encoding latin-1, exclude this file, or use "
                "--encoding_errors replace"
            ) from error
        except UnicodeError as error:
            raise UnreadableFileError(f"{printable(name)}: not {decoding.encoding} text: {error}") from error
        statistics.undecodable += _undecodable.count - undecodable
        if newlines is not None:
            statistics.newlines_converted += text.count("\r")
            text = newlines.decode(text, is_last)
        if digest is not None:
            digest.update(chunk if preserves_bytes else _utf8(text, name))
        if text:
            if is_first:
                statistics.byte_order_mark = text.startswith(BYTE_ORDER_MARK)
                is_first = False
            statistics.zeros += chunk.count(b"\0") if preserves_bytes else text.count("\0")
            yield text


def _utf8(text: str, name: str) -> bytes:
    """Return the UTF-8 encoding of decoded text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # some codecs, such as `unicode_escape`, produce lone surrogates
        raise UnreadableFileError(
            f"{printable(name)}: contains U+{ord(text[error.start]):04X}, a lone surrogate, which is not a "
            "character; specify another encoding or exclude this file"
        ) from error


def text_chunks(
    path: str, name: str, decoding: Decoding, size: int, digest: "hashlib._Hash | None" = None
) -> Iterator[str]:
    """Yield the text of a file in chunks of at most `size` characters, which end after a line ending if there is one nearby.

    Args:
        digest: Updated with the UTF-8 encoding of the text.
    """
    pending: list[str] = []
    length = 0
    for text in decoded(path, name, decoding, max(1, size // 4), digest=digest):
        pending.append(text)
        length += len(text)
        while length > size:
            text = "".join(pending)
            stop = _last_line_end(text, size - min(LINE_END_SEARCH_CHARACTERS, size // 2), size)
            yield text[:stop]
            pending, length = [text[stop:]], length - stop
    if length:
        yield "".join(pending)


def _last_line_end(text: str, first: int, last: int) -> int:
    """Return the last position in (first, last) after a line ending and before a character that is not white space.

    No word of a byte-level BPE tokenizer extends across such a position. If there is none, return `last`.
    """
    position = text.rfind("\n", first, last - 1)
    while position >= 0 and text[position + 1].isspace():
        position = text.rfind("\n", first, position)
    return position + 1 or last
