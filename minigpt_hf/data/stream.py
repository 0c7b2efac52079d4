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

A stream may consist of shards, which are streams or files of datatrove (see `shards`). Its directory then contains only
`stream.json`, which lists them in order.
"""

import itertools
import json
import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError
from .array_file import ArrayFile
from .cache import cached
from .documents import Documents
from .encoding import Encoder, UnknownCharacterError, fastest_encoder
from .sharded import Part, ShardedArray, ShardStore
from .tokenizer import bos_token_id, tokenizer_fingerprint, vocabulary_size

CHECKED_DOCUMENTS = 1000  # number of offsets for which the BOS token is checked on opening
DOCUMENTS_PER_READ = 100_000  # number of offsets in memory
SHORT_CHARACTERS = 2_000_000  # below this length, choosing an encoder takes longer than encoding
COMPARED_CHARACTERS = 1_000_000  # encoded with `tokenizers` as well, to verify a faster encoder
BATCH_CHARACTERS, BATCH_CHUNKS = 800_000, 10_000  # limits of a batch that one thread encodes


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
        store: The files of its shards, if it consists of shards.
    """

    folder: Path
    tokens: np.ndarray | ArrayFile | ShardedArray
    documents: np.ndarray | ArrayFile | ShardedArray
    bos_token_id: int
    targets: int
    characters: int
    bytes: int
    fingerprint: str
    store: ShardStore | None = None

    @classmethod
    def open(cls, folder: Path, store: ShardStore | None = None) -> "TokenStream":
        """Open a stream written by `build_stream`, or the index of its shards.

        Args:
            store: The files of the shards.

        Raises:
            MiniGPTError: if its files are inconsistent.
        """
        metadata = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        bos = metadata["end_of_text"]
        tokens: ArrayFile | ShardedArray
        documents: ArrayFile | ShardedArray
        if store is not None:
            tokens, documents = _arrays_of_shards(metadata, store)
        else:
            tokens = ArrayFile(folder / "tokens.bin", metadata["dtype"])
            documents = _npy_file(folder / "documents.npy")
        counts = (len(tokens), len(documents))
        if counts != (metadata["tokens"], metadata["documents"]):
            raise MiniGPTError(f"{counts} tokens and documents instead of {metadata['tokens'], metadata['documents']}")
        if store is None and not _are_starts(documents, tokens, bos):  # shards were verified when they were merged
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
            store=store,
        )

    def __reduce__(self):
        # Other processes open the files instead of receiving the tokens.
        return TokenStream.open, (self.folder, self.store)

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


def _npy_file(file: Path) -> ArrayFile:
    with file.open("rb") as opened:
        np.lib.format.read_magic(opened)
        _, _, dtype = np.lib.format.read_array_header_1_0(opened)
        return ArrayFile(file, dtype, opened.tell())


def _opened(store: ShardStore, name: str, dtype: np.dtype | None = None) -> ArrayFile:
    """Open a file of a shard; without `dtype`, in the format of NumPy."""
    return _npy_file(store.path(name)) if dtype is None else ArrayFile(store.path(name), dtype)


def _arrays_of_shards(metadata: dict[str, Any], store: ShardStore) -> tuple[ShardedArray, ShardedArray]:
    """Return tokens and offsets of documents of a stream that consists of shards.

    Files of datatrove have the separator after each document, `d₁ E d₂ E`. Since the stream is circular, it is read as
    `E d₁ E d₂`: E, followed by all tokens except the last.
    """
    ids, offsets, separator = np.dtype(metadata["dtype"]), np.dtype("<i8"), metadata["end_of_text"]
    tokens, documents, start = [], [], 0
    is_datatrove = metadata.get("format") == "datatrove"
    if is_datatrove and metadata["tokens"]:
        tokens.append(Part(1, lambda: np.array([separator], ids)))
    for shard in metadata["shards"]:
        name, number = shard["path"], shard["documents"]
        if is_datatrove:
            tokens.append(Part(shard["tokens"], partial(_opened, store, name, ids)))
            # The file has the end of each document, which is the start of the next.
            documents.append(Part(1, lambda: np.zeros(1, offsets), start))
            documents.append(Part(number - 1, partial(_opened, store, f"{name}.index", offsets), start))
        else:
            tokens.append(Part(shard["tokens"], partial(_opened, store, f"{name}/tokens.bin", ids)))
            documents.append(Part(number, partial(_opened, store, f"{name}/documents.npy"), start))
        start += shard["tokens"]
    if is_datatrove and tokens:
        tokens[-1] = replace(tokens[-1], length=tokens[-1].length - 1)
    return ShardedArray(tokens, ids, store.max_open()), ShardedArray(documents, offsets, store.max_open())


def _are_starts(documents: ArrayFile | ShardedArray, tokens: ArrayFile | ShardedArray, bos: int) -> bool:
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
        num_proc: Number of encoding threads; default: one per core, at most 16. The encoders release the interpreter lock.
            Results are collected in order, so memory use does not depend on the size of the corpus.
        progress: Called with the number of characters of each batch after it has been encoded.
        max_tokens: Maximum number of tokens, BOS tokens included. The last document is truncated at a character boundary;
            a document of which no token fits is omitted.
    """
    fingerprint = stream_fingerprint(documents, tokenizer)
    if max_tokens is not None:
        fingerprint += f"-at-most-{max_tokens}"
    return cached(
        cache_dir / "streams" / fingerprint,
        lambda folder: write_stream(folder, fingerprint, documents, tokenizer, num_proc, progress, max_tokens),
        TokenStream.open,
        cache_dir,
        "token stream",
    )


def stream_fingerprint(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a stream: hashes of the text and of everything that determines its ids."""
    bos = bos_token_id(tokenizer)
    suffix = "" if bos == tokenizer.eos_token_id else f"-{bos}"
    return f"{documents.fingerprint[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}{suffix}"


def write_stream(
    folder: Path,
    fingerprint: str,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    progress: Callable[[int], None] = lambda characters: None,
    max_tokens: int | None = None,
) -> None:
    """Write the files of a stream into an existing folder; for the arguments see `build_stream`.

    Raises:
        UnknownCharacterError: stating its position, if a character has no id.
    """
    try:
        _write_stream(folder, fingerprint, documents, tokenizer, num_proc, progress, max_tokens)
    except UnknownCharacterError as error:
        if (position := documents.position_of(error.character)) is None:
            raise
        raise UnknownCharacterError(f"{position}: {error}", error.character) from error


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
    bos = bos_token_id(tokenizer)
    limit = sys.maxsize if max_tokens is None else max_tokens
    tokens = number = characters = size = 0
    encoder, chunks = _encoder_for(documents, tokenizer.backend_tokenizer.to_str())
    batches = _encode(encoder, chunks, bos, dtype, num_proc or min(16, os.cpu_count() or 1))
    with (folder / "tokens.bin").open("wb") as ids, (folder / "documents.npy").open("wb") as offsets, closing(batches):
        _write_header(offsets, number)
        for batch in batches:
            if is_last := tokens + len(batch.tokens) > limit:
                batch = _truncate(batch, limit - tokens, encoder, bos, dtype)
            ids.write(batch.tokens.data)
            offsets.write((batch.starts + tokens).data)
            tokens += len(batch.tokens)
            number += len(batch.starts)
            characters += sum(len(text) for _, text in batch.chunks)
            size += sum(len(text) if text.isascii() else len(text.encode()) for _, text in batch.chunks)
            progress(sum(len(text) for _, text in batch.chunks))
            if is_last:
                break
        _write_header(offsets, number)
    metadata = {
        "dtype": dtype.str,
        "end_of_text": bos,
        "tokens": tokens,
        "documents": number,
        "characters": characters,
        "bytes": size,
        "fingerprint": fingerprint,
    }
    (folder / "stream.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, length: int) -> None:
    """Write the header of a .npy file of `length` offsets. Its size does not depend on `length`."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (length,)})


Chunk = tuple[bool, str]  # (whether it starts a document, text)


@dataclass(frozen=True)
class EncodedBatch:
    """Chunks and their ids.

    Args:
        chunks: The chunks.
        tokens: Ids of all chunks, with BOS before each document.
        ends: Position in `tokens` of the end of each chunk.
        starts: Position in `tokens` of the BOS of each document, int64.
    """

    chunks: list[Chunk]
    tokens: np.ndarray
    ends: np.ndarray
    starts: np.ndarray

    @classmethod
    def encode(cls, encoder: Encoder, chunks: list[Chunk], bos: int, dtype: np.dtype) -> "EncodedBatch":
        """Encode chunks of documents."""
        starts_document = np.array([starts for starts, _ in chunks], dtype=bool)
        encoded = encoder.encode_batch([text for _, text in chunks])
        separator = np.array([bos], dtype=dtype)
        parts = [
            (separator, ids.astype(dtype)) if starts else (ids.astype(dtype),)
            for starts, ids in zip(starts_document, encoded, strict=True)
        ]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64) + starts_document
        ends = np.cumsum(lengths)
        tokens = np.concatenate([np.empty(0, dtype), *chain.from_iterable(parts)])
        return cls(chunks, tokens, ends, (ends - lengths)[starts_document])


def _truncate(batch: EncodedBatch, max_tokens: int, encoder: Encoder, bos: int, dtype: np.dtype) -> EncodedBatch:
    """Return the beginning of a batch with at most `max_tokens` tokens, which ends at a character boundary."""
    complete = int(np.searchsorted(batch.ends, max_tokens, side="right"))
    chunks = batch.chunks[:complete]
    starts_document, text = batch.chunks[complete]
    room = max_tokens - (int(batch.ends[complete - 1]) if complete else 0) - starts_document
    # The search assumes that the number of tokens grows with the text. In the rare cases where it decreases, the result is
    # valid but may be shorter than possible.
    fit = bisect_right(range(1, len(text) + 1), room, key=lambda length: len(encoder(text[:length])))
    if fit:
        chunks = [*chunks, (starts_document, text[:fit])]
    return EncodedBatch.encode(encoder, chunks, bos, dtype)


def _encoder_for(documents: Documents, tokenizer_json: str) -> tuple[Encoder, Iterator[Chunk]]:
    """Return an encoder and the chunks to encode. For a long text, the encoder is verified on the first chunks."""
    encoder = Encoder(tokenizer_json)
    chunks = encoder.split_into_chunks(documents.parts())
    if documents.characters is not None and documents.characters < SHORT_CHARACTERS:
        return encoder, chunks
    first, characters = [], 0
    for chunk in chunks:
        first.append(chunk)
        characters += len(chunk[1])
        if characters >= COMPARED_CHARACTERS:
            break
    compared = [text[:COMPARED_CHARACTERS] for _, text in first]  # a chunk that is one word may be longer
    return fastest_encoder(tokenizer_json, compared), chain(first, chunks)


def _encode(
    encoder: Encoder, chunks: Iterable[Chunk], bos: int, dtype: np.dtype, num_threads: int
) -> Generator[EncodedBatch]:
    """Encode chunks in order; with several threads, at most two batches per thread are pending."""
    if num_threads == 1:
        for batch in _batches(chunks):
            yield EncodedBatch.encode(encoder, batch, bos, dtype)
        return
    pending: deque[Future[EncodedBatch]] = deque()
    pool = ThreadPoolExecutor(num_threads, "encoder")
    try:
        for batch in _batches(chunks):
            pending.append(pool.submit(EncodedBatch.encode, encoder, batch, bos, dtype))
            if len(pending) >= 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    characters = 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk[1])
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_CHUNKS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
