"""Encode documents into one array of token ids on disk, of which slices are read.

    E d₁ E d₂ … E dₙ      E = BOS token (EOS for a tokenizer without BOS)

Each document is preceded by E, which is also the label of the last token of the previous document. Training reads the stream
as circular, so the first E ends the last document.

A stream is a directory that is written atomically and verified before use (see `cache`). Its name is a hash of the text and
the tokenizer, so that a stream is built only once:
    tokens.bin      ids, little-endian; uint16 for a vocabulary of at most 65,536 tokens, otherwise uint32
    documents.npy   offset of the E of each document, int64
    stream.json     counts and metadata
    manifest.json   size and SHA-256 of each file
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError, UnreadableFileError
from .cache import cached
from .documents import Documents
from .tokenizer import Encoder, bos_token_id, tokenizer_fingerprint, vocabulary_size

CHECKED_DOCUMENTS = 1000  # number of offsets for which the BOS token is checked on opening
DOCUMENTS_PER_READ = 100_000  # number of offsets in memory
SINGLE_PROCESS_CHARACTERS = 2_000_000  # below this length, starting processes takes longer than encoding
CHUNKS_PER_JOB = 8


class ArrayFile:
    """A one-dimensional array in a file, of which slices are read into memory.

    In contrast to a memory map, the pages read do not count as memory of this process, and a file that is truncated leads to
    an exception instead of the signal SIGBUS. Forked processes may read concurrently.

    Args:
        file: The file.
        dtype: Type of the elements.
        offset: Position of the first element in bytes.
    """

    def __init__(self, file: Path, dtype: np.dtype | str, offset: int = 0):
        self.file, self.dtype, self.offset = file, np.dtype(dtype), offset
        self._descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._length = (os.fstat(self._descriptor).st_size - offset) // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Read the elements of a slice with step 1.

        Raises:
            UnreadableFileError: if the file has been truncated.
        """
        start, stop, _ = part.indices(self._length)
        size, position = max(0, stop - start) * self.dtype.itemsize, self.offset + start * self.dtype.itemsize
        content = self._read(size, position)
        while len(content) < size:  # a single call reads at most 2 GiB
            if not (more := self._read(size - len(content), position + len(content))):
                raise UnreadableFileError(
                    f"{self.file}: was truncated while it was in use; run the same command again, which verifies it"
                )
            content += more
        return np.frombuffer(content, self.dtype)

    def _read(self, size: int, position: int) -> bytes:
        if os.name == "nt":  # has no `pread`
            os.lseek(self._descriptor, position, os.SEEK_SET)
            return os.read(self._descriptor, size)
        return os.pread(self._descriptor, size, position)


@dataclass(frozen=True)
class TokenStream:
    """A token stream on disk.

    Args:
        folder: Its directory.
        tokens: Ids [N], or the file that contains them.
        documents: Offset in `tokens` of the BOS token of each document [number of documents], or the file.
        bos_token_id: Id of the token that precedes each document.
        targets: Number of tokens that are scored: all but the BOS tokens, or those of answers in conversations.
        characters: Number of characters of the text.
        bytes: Number of UTF-8 bytes of the text, or of the answers in conversations.
        fingerprint: Identifies text and tokenizer.
    """

    folder: Path
    tokens: np.ndarray | ArrayFile
    documents: np.ndarray | ArrayFile
    bos_token_id: int
    targets: int
    characters: int
    bytes: int
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "TokenStream":
        """Open a stream written by `build_stream`.

        Raises:
            MiniGPTError: if its files are inconsistent.
        """
        metadata = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        bos = metadata["end_of_text"]
        tokens = ArrayFile(folder / "tokens.bin", metadata["dtype"])
        mapped = np.load(folder / "documents.npy", mmap_mode="r")  # only to read the header
        documents = ArrayFile(folder / "documents.npy", mapped.dtype, getattr(mapped, "offset", 0))
        counts = (len(tokens), len(documents))
        if counts != (metadata["tokens"], metadata["documents"]):
            raise MiniGPTError(f"{counts} tokens and documents instead of {metadata['tokens'], metadata['documents']}")
        if not _are_starts(documents, tokens, bos):
            raise MiniGPTError("the offsets of the documents do not point to BOS tokens")
        return cls(
            folder=folder,
            tokens=tokens,
            documents=documents,
            bos_token_id=bos,
            targets=metadata.get("targets", len(tokens) - len(documents)),
            characters=metadata["characters"],
            bytes=metadata["bytes"],
            fingerprint=metadata["fingerprint"],
        )

    def __reduce__(self):
        return TokenStream.open, (self.folder,)  # other processes open the files instead of receiving the tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def iterate_documents(self) -> Iterator[np.ndarray]:
        """Yield the ids of each document, without its BOS token."""
        for begin in range(0, len(self.documents), DOCUMENTS_PER_READ):
            starts = self.documents[begin : begin + DOCUMENTS_PER_READ + 1].tolist()
            if begin + DOCUMENTS_PER_READ >= len(self.documents):
                starts.append(len(self.tokens))
            for start, end in itertools.pairwise(starts):
                yield self.tokens[start + 1 : end]


def _are_starts(documents: ArrayFile, tokens: ArrayFile, bos: int) -> bool:
    """Whether offsets increase from 0, and a sample of them points to BOS tokens."""
    before = -1
    for begin in range(0, len(documents), DOCUMENTS_PER_READ):
        offsets = documents[begin : begin + DOCUMENTS_PER_READ]
        if not (np.diff(offsets, prepend=before) > 0).all() or (begin == 0 and offsets[0] != 0):
            return False
        before = offsets[-1]
    sample = range(0, len(documents), -(-len(documents) // CHECKED_DOCUMENTS) or 1)
    starts = (int(documents[i : i + 1][0]) for i in sample)
    return before < len(tokens) and all(tokens[start : start + 1][0] == bos for start in starts)


def build_stream(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    num_proc: int | None = None,
    progress: Callable[[int], None] = lambda characters: None,
    max_tokens: int | None = None,
) -> TokenStream:
    """Encode documents into a stream, or return the cached stream of the same text and tokenizer.

    Args:
        documents: The text.
        cache_dir: Root of the cache; streams are stored in `streams/`.
        num_proc: Number of encoding processes; default: one per core, at most 16. They receive chunks and results are
            collected in order, so memory use does not depend on the size of the corpus.
        progress: Called with the number of characters of each chunk after it has been encoded.
        max_tokens: Maximum number of tokens, BOS tokens included. The last document is truncated at a character boundary;
            a document of which no token fits is omitted.
    """
    fingerprint = stream_fingerprint(documents, tokenizer)
    if max_tokens is not None:
        fingerprint += f"-at-most-{max_tokens}"
    return cached(
        cache_dir / "streams" / fingerprint,
        lambda folder: _write_stream(folder, fingerprint, documents, tokenizer, num_proc, progress, max_tokens),
        TokenStream.open,
        cache_dir,
        "token stream",
    )


def stream_fingerprint(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a stream: hashes of the text and of everything that determines its ids."""
    bos = bos_token_id(tokenizer)
    suffix = "" if bos == tokenizer.eos_token_id else f"-{bos}"
    return f"{documents.fingerprint[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}{suffix}"


def _write_stream(
    folder: Path,
    fingerprint: str,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None,
    progress: Callable[[int], None],
    max_tokens: int | None,
) -> None:
    dtype = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4")
    bos = np.array([bos_token_id(tokenizer)], dtype=dtype)
    limit = sys.maxsize if max_tokens is None else max_tokens
    offsets: list[int] = []
    written = characters = size = 0
    with (folder / "tokens.bin").open("wb") as file:
        for starts_document, text, ids in _encode(documents, tokenizer, dtype, num_proc):
            room = limit - written - starts_document
            is_last = len(ids) > room
            if is_last:
                text, ids = _truncate(text, room, tokenizer, dtype)
                if not len(ids):
                    break
            if starts_document:
                offsets.append(written)
                file.write(bos.data)
                written += 1
            file.write(ids.data)
            written += len(ids)
            characters += len(text)
            size += len(text.encode())
            progress(len(text))
            if is_last:
                break
    np.save(folder / "documents.npy", np.array(offsets, dtype=np.int64))
    metadata = {
        "dtype": dtype.str,
        "end_of_text": bos_token_id(tokenizer),
        "tokens": written,
        "documents": len(offsets),
        "characters": characters,
        "bytes": size,
        "fingerprint": fingerprint,
    }
    (folder / "stream.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _truncate(
    text: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype
) -> tuple[str, np.ndarray]:
    """Return the longest beginning of a text with at most `max_tokens` tokens, and its ids."""
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    # The search assumes that the number of tokens grows with the text. In the rare cases where it decreases, the result is
    # valid but may be shorter than possible.
    fit = bisect_right(range(1, len(text) + 1), max_tokens, key=lambda length: len(encoder(text[:length])))
    return text[:fit], np.asarray(encoder(text[:fit]), dtype=dtype)


EncodedChunk = tuple[bool, str, np.ndarray]  # (whether it starts a document, text, ids)


def _encode(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype, num_proc: int | None
) -> Iterator[EncodedChunk]:
    """Encode chunks in order; short texts in this process."""
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    chunks = Encoder(tokenizer_json).split_into_chunks(documents.parts())
    num_proc = num_proc or min(16, os.cpu_count() or 1)
    is_short = documents.characters is not None and documents.characters < SINGLE_PROCESS_CHARACTERS
    if num_proc == 1 or is_short:
        _initialize(tokenizer_json, dtype)
        yield from ((starts_document, text, _encode_chunk(text)) for starts_document, text in chunks)
        return
    pool = ProcessPoolExecutor(num_proc, initializer=_initialize_worker, initargs=(tokenizer_json, dtype))
    try:
        yield from _encode_in_pool(pool, chunks, 2 * num_proc)
    except BrokenProcessPool as error:
        raise MiniGPTError(
            "a tokenization process was killed, possibly because memory ran out; use fewer processes (--num_proc) or free "
            "memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_pool(
    pool: ProcessPoolExecutor, chunks: Iterable[tuple[bool, str]], max_pending: int
) -> Iterator[EncodedChunk]:
    """Encode chunks in the processes of a pool and yield them in order, with at most `max_pending` jobs submitted ahead."""
    chunks = iter(chunks)
    pending: deque[tuple[list[tuple[bool, str]], Future[list[np.ndarray]]]] = deque()

    def oldest_result() -> Iterator[EncodedChunk]:
        batch, future = pending.popleft()
        return ((starts, text, ids) for (starts, text), ids in zip(batch, future.result(), strict=True))

    while batch := list(itertools.islice(chunks, CHUNKS_PER_JOB)):
        pending.append((batch, pool.submit(_encode_chunks, [text for _, text in batch])))
        if len(pending) >= max_pending:
            yield from oldest_result()
    while pending:
        yield from oldest_result()


def _initialize_worker(tokenizer_json: str, dtype: np.dtype) -> None:
    """Initialize a process of the pool: one thread, and termination only by its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the entire process group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process inherits the handler of its parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _initialize(tokenizer_json, dtype)


def _exit_with_parent() -> None:
    """Exit if the parent was killed; otherwise this process would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only processes of the pool call this
    parent.join()
    os._exit(1)


# Of this process, set by `_initialize`.
_encoder: Encoder
_dtype: np.dtype


def _initialize(tokenizer_json: str, dtype: np.dtype) -> None:
    """Create the encoder of this process."""
    global _encoder, _dtype
    _encoder, _dtype = Encoder(tokenizer_json), dtype


def _encode_chunks(chunks: list[str]) -> list[np.ndarray]:
    return [_encode_chunk(text) for text in chunks]


def _encode_chunk(text: str) -> np.ndarray:
    return np.asarray(_encoder(text), dtype=_dtype)
