"""Documents + tokenizer -> one flat stream of token ids on disk.

    E d₁ E d₂ … E dₙ      E = <|endoftext|>

Each document is opened by an E, which as the label of the last token before it also closes that one; read in a circle,
the first E closes the last document. In: `Documents`. Out: a `TokenStream`, memory-mapped, found again by the content of
the text and the tokenizer. It refuses nothing that the tokenizer can encode.

A stream is a folder:
    tokens.bin      ids, little-endian, uint16 if the vocabulary allows and else uint32
    documents.npy   where each document's E stands, int64
    stream.json     counts, and what the stream was made from
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .texts import Texts
from .tokenizer import Encoder, tokenizer_fingerprint, vocabulary_size


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
        """Map a stream that `build_stream` wrote."""
        about = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        return cls(
            folder=folder,
            tokens=np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r"),
            documents=np.load(folder / "documents.npy", mmap_mode="r"),
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
        cache_dir: Folder that holds streams, each under its fingerprint.
        num_proc: Processes that encode; default: one for each core, at most 16. Text goes to them in pieces and comes
            back in order, so the memory in use does not depend on the size of the corpus.
        progress: Told the number of characters of each piece as it is done.
        max_tokens: End the stream after the piece in which it gets that long.
    """
    fingerprint = f"{texts.fingerprint[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}"
    if max_tokens is not None:
        fingerprint += f"-{max_tokens}"
    folder = cache_dir / fingerprint
    if not (folder / "stream.json").is_file():
        # Whole or absent: written beside its place, and moved there when complete.
        unfinished = cache_dir / f".{fingerprint}.{os.getpid()}"
        unfinished.mkdir(parents=True)
        try:
            _write_stream(unfinished, fingerprint, texts, tokenizer, num_proc, progress, max_tokens)
            if not folder.exists():  # another process may have been faster; its stream is the same
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStream.open(folder)


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
    end_of_text = np.array([tokenizer.eos_token_id], dtype=dtype)
    starts, written, characters, size = [], 0, 0, 0
    with (folder / "tokens.bin").open("wb") as file:
        for opens_document, ids, text_length, byte_length in _encode(texts, tokenizer, dtype, num_proc):
            if opens_document:
                starts.append(written)
                file.write(end_of_text)
                written += 1
            file.write(ids)
            written += len(ids)
            characters += text_length
            size += byte_length
            progress(text_length)
            if max_tokens is not None and written >= max_tokens:
                break
    np.save(folder / "documents.npy", np.array(starts, dtype=np.int64))
    about = {
        "dtype": dtype.str,
        "end_of_text": tokenizer.eos_token_id,
        "tokens": written,
        "documents": len(starts),
        "characters": characters,
        "bytes": size,
        "fingerprint": fingerprint,
    }
    (folder / "stream.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


Encoded = tuple[bool, np.ndarray, int, int]  # opens a document?, ids, characters, bytes


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
        yield from map(_encode_piece, jobs)
    else:
        with multiprocessing.Pool(num_proc, _start_process, (tokenizer_json, dtype)) as pool:
            yield from pool.imap(_encode_piece, jobs, chunksize=8)


def _start_process(tokenizer_json: str, dtype: np.dtype) -> None:
    """The same in a process of the pool, which is one of as many as there are cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _start(tokenizer_json, dtype)


def _start(tokenizer_json: str, dtype: np.dtype) -> None:
    """Give this process its encoder."""
    global _encoder, _dtype
    _encoder, _dtype = Encoder(tokenizer_json), dtype


def _encode_piece(job: tuple[bool, str]) -> Encoded:
    opens_document, piece = job
    return opens_document, np.array(_encoder(piece), dtype=_dtype), len(piece), len(piece.encode())
