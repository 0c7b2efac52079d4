"""Documents + tokenizer -> one flat stream of token ids on disk.

    E d₁ E d₂ … E dₙ      E = the token that opens a document: BOS, or EOS of a tokenizer without BOS

Each document is opened by an E, which as the label of the last token before it also closes that one; read in a circle,
the first E closes the last document. In: `Documents`. Out: a `TokenStream`, memory-mapped, found again by the content of
the text and the tokenizer. It refuses nothing that the tokenizer can encode.

A stream is a directory, written atomically and verified before it is used (see `cache`):
    tokens.bin      ids, little-endian, uint16 up to a vocabulary of 65,536 and else uint32
    documents.npy   offset of each document's E, int64
    stream.json     counts, and what the stream was made from
    manifest.json   size and SHA-256 of each file
"""

import json
import multiprocessing
import os
import signal
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError
from .cache import cached
from .documents import Texts
from .tokenizer import Encoder, opening_token, tokenizer_fingerprint, vocabulary_size

SAMPLED_DOCUMENTS = 1000  # of so many it is checked at every start that an E opens them


@dataclass(frozen=True)
class TokenStream:
    """A stream on disk. `tokens` [N] and `documents` [number of documents] are memory-mapped."""

    folder: Path
    tokens: np.ndarray
    documents: np.ndarray
    end_of_text: int
    characters: int
    bytes: int
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "TokenStream":
        """Map a stream that `build_stream` wrote.

        Raises:
            MiniGPTError: if its files do not fit together.
        """
        about = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        size = (folder / "tokens.bin").stat().st_size
        tokens = (
            np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r") if size else np.zeros(0, about["dtype"])
        )
        documents = np.load(folder / "documents.npy", mmap_mode="r")
        counts = (len(tokens), len(documents))
        if counts != (about["tokens"], about["documents"]):
            raise MiniGPTError(f"{counts} tokens and documents instead of {about['tokens'], about['documents']}")
        sample = documents[:: -(-len(documents) // SAMPLED_DOCUMENTS) or 1]
        if len(documents) and (
            documents[0] != 0
            or documents[-1] >= len(tokens)
            or not (np.diff(documents) > 0).all()
            or not (tokens[sample] == about["end_of_text"]).all()
        ):
            raise MiniGPTError("the offsets of the documents do not point to the tokens that open them")
        return cls(
            folder=folder,
            tokens=tokens,
            documents=documents,
            end_of_text=about["end_of_text"],
            characters=about["characters"],
            bytes=about["bytes"],
            fingerprint=about["fingerprint"],
        )

    def __reduce__(self):
        return TokenStream.open, (self.folder,)  # another process maps the file; it is not sent the tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def texts(self) -> Iterator[np.ndarray]:
        """The ids of each document, without its E."""
        ends = np.append(self.documents[1:], len(self.tokens))
        for start, end in zip(self.documents, ends, strict=True):
            yield self.tokens[start + 1 : end]


def build_stream(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    num_proc: int | None = None,
    progress: Callable[[int], None] = lambda characters: None,
    max_tokens: int | None = None,
) -> TokenStream:
    """Encode documents into a stream, or find the one that was made from the same text with the same tokenizer.

    Args:
        cache_dir: Root of the cache; streams are in `streams/`, each under its fingerprint.
        num_proc: Processes that encode; default: one for each core, at most 16. Text goes to them in pieces and comes
            back in order, so the memory in use does not depend on the size of the corpus.
        progress: Called with the number of characters of each piece that is done.
        max_tokens: The stream has at most this many tokens, those that open documents included: the last document is cut
            short, between two characters, and one of which not a single token fits is left out.
    """
    fingerprint = stream_fingerprint(texts, tokenizer)
    if max_tokens is not None:
        fingerprint += f"-at-most-{max_tokens}"
    return cached(
        cache_dir / "streams" / fingerprint,
        lambda folder: _write_stream(folder, fingerprint, texts, tokenizer, num_proc, progress, max_tokens),
        TokenStream.open,
        cache_dir,
        "token stream",
    )


def stream_fingerprint(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a stream: hashes of the text and of all that decides which ids it gets."""
    opening = opening_token(tokenizer)
    other = "" if opening == tokenizer.eos_token_id else f"-{opening}"
    return f"{texts.fingerprint[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}{other}"


def _write_stream(
    folder: Path,
    fingerprint: str,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None,
    progress: Callable[[int], None],
    max_tokens: int | None,
) -> None:
    dtype = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4")
    end_of_text = np.array([opening_token(tokenizer)], dtype=dtype)
    starts, written, characters, size = [], 0, 0, 0
    with (folder / "tokens.bin").open("wb") as file:
        for opens_document, piece, ids in _encode(texts, tokenizer, dtype, num_proc):
            is_last = max_tokens is not None and written + opens_document + len(ids) > max_tokens
            if is_last:
                piece, ids = _head(piece, max_tokens - written - opens_document, tokenizer, dtype)
                if not len(ids):
                    break
            if opens_document:
                starts.append(written)
                file.write(end_of_text)
                written += 1
            file.write(ids)
            written += len(ids)
            characters += len(piece)
            size += len(piece.encode())
            progress(len(piece))
            if is_last:
                break
    np.save(folder / "documents.npy", np.array(starts, dtype=np.int64))
    about = {
        "dtype": dtype.str,
        "end_of_text": opening_token(tokenizer),
        "tokens": written,
        "documents": len(starts),
        "characters": characters,
        "bytes": size,
        "fingerprint": fingerprint,
    }
    (folder / "stream.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _head(piece: str, most: int, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype) -> tuple[str, np.ndarray]:
    """The beginning of a piece that has at most so many tokens, and these."""
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    # The number of tokens hardly ever falls as text is added; if it does, the beginning is shorter than it could be.
    fit = bisect_right(range(1, len(piece) + 1), most, key=lambda length: len(encoder(piece[:length])))
    return piece[:fit], np.asarray(encoder(piece[:fit]), dtype=dtype)


Encoded = tuple[bool, str, np.ndarray]  # opens a document?, text, ids


def _encode(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype, num_proc: int | None
) -> Iterator[Encoded]:
    """Encode piece by piece, in order; in this process if there is only a little."""
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    jobs = Encoder(tokenizer_json).pieces(texts.parts())
    num_proc = num_proc or min(16, os.cpu_count() or 1)
    is_little = texts.characters is not None and texts.characters < 2_000_000  # starting processes would take longer
    if num_proc == 1 or is_little:
        _start(tokenizer_json, dtype)
        yield from ((opens, piece, _encode_piece(piece)) for opens, piece in jobs)
        return
    pool = ProcessPoolExecutor(num_proc, initializer=_start_process, initargs=(tokenizer_json, dtype))
    try:
        yield from _in_order(pool, jobs, 2 * num_proc)
    except BrokenProcessPool as error:
        raise MiniGPTError(
            "a process that tokenizes was killed, perhaps because memory ran out; use fewer processes (--num_proc) or "
            "free memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[tuple[bool, str]], ahead: int) -> Iterator[Encoded]:
    """Encode eight pieces at a time in the processes of a pool; no more than `ahead` times eight are under way."""
    jobs, under_way = iter(jobs), deque()

    def done() -> Iterator[Encoded]:
        batch, encoded = under_way.popleft()
        return ((opens, piece, ids) for (opens, piece), ids in zip(batch, encoded.result(), strict=True))

    while batch := list(islice(jobs, 8)):
        under_way.append((batch, pool.submit(_encode_pieces, [piece for _, piece in batch])))
        if len(under_way) >= ahead:
            yield from done()
    while under_way:
        yield from done()


def _start_process(tokenizer_json: str, dtype: np.dtype) -> None:
    """Prepare a process of the pool: one thread, and its parent alone decides when it ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the whole process group by the terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process inherits its parent's handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start(tokenizer_json, dtype)


def _end_with_parent() -> None:
    """End this process when its parent was killed: it would wait for work, and keep its memory and locks, for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _start(tokenizer_json: str, dtype: np.dtype) -> None:
    """Give this process its encoder."""
    global _encoder, _dtype
    _encoder, _dtype = Encoder(tokenizer_json), dtype


def _encode_pieces(pieces: list[str]) -> list[np.ndarray]:
    return [_encode_piece(piece) for piece in pieces]


def _encode_piece(piece: str) -> np.ndarray:
    return np.asarray(_encoder(piece), dtype=_dtype)
