"""Verify and count the token files of datatrove's `DocumentTokenizer`, which are read without copying them.

NAME.ds          ids, little-endian; uint16 or uint32; each document is followed by the separator
NAME.ds.index    end of each document in tokens, uint64
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError
from .array_file import ArrayFile
from .encoding import byte_alphabet
from .tokenizer import bos_token_id, vocabulary_size

BLOCK_DOCUMENTS = 10_000  # read at a time


def count_tokens(file: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Verify a file; return the number of its tokens and documents, and of characters and bytes without separators.

    Raises:
        MiniGPTError: if the file and its index are inconsistent, or were not written with this tokenizer.
    """
    index = file.with_name(f"{file.name}.index")
    if not index.is_file():
        raise MiniGPTError(f"{file}: has no {index.name}; write it with `save_index=True`")
    ends, width = ArrayFile(index, "<i8"), 2 if vocabulary_size(tokenizer) <= 2**16 else 4
    total = int(ends[len(ends) - 1 :][0]) if len(ends) else 0
    if (size := file.stat().st_size) != total * width:
        raise MiniGPTError(
            f"{file}: has {size:,} bytes instead of {total:,} tokens of {width} bytes: it is truncated, or was written with "
            "another tokenizer"
        )
    characters = number_of_bytes = 0
    counter = _Counter(tokenizer)
    for number, (ids, lengths) in enumerate(_blocks(ArrayFile(file, f"<u{width}"), ends, index)):
        closing = np.cumsum(lengths) - 1
        if not (is_separated := ids[closing] == bos_token_id(tokenizer)).all() or ids.max() >= len(counter):
            document = number * BLOCK_DOCUMENTS + int(np.argmin(is_separated)) + 1
            raise MiniGPTError(
                f"{file}: document {document:,} does not end with the token {bos_token_id(tokenizer)} of --tokenizer, or has "
                "an unknown id; give the tokenizer with which it was written"
            )
        more = counter.count(np.delete(ids, closing), lengths - 1)
        characters, number_of_bytes = characters + more[0], number_of_bytes + more[1]
    return {"tokens": total, "documents": len(ends), "characters": characters, "bytes": number_of_bytes}


def _blocks(tokens: ArrayFile, ends: ArrayFile, index: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the ids of consecutive documents, and the length of each."""
    start = 0
    for begin in range(0, len(ends), BLOCK_DOCUMENTS):
        block = ends[begin : begin + BLOCK_DOCUMENTS]
        lengths = np.diff(block, prepend=start)
        if not (lengths > 0).all():
            raise MiniGPTError(f"{index}: the ends of the documents do not increase; write it again")
        yield tokens[start : int(block[-1])], lengths
        start = int(block[-1])


class _Counter:
    """Counts characters and UTF-8 bytes of ids: by a table for byte-level tokenizers, otherwise by decoding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.backend, self.table = tokenizer.backend_tokenizer, np.zeros((vocabulary_size(tokenizer), 2), np.int64)
        self.is_byte_level = (json.loads(self.backend.to_str())["decoder"] or {}).get("type") == "ByteLevel"
        byte_of, added = (
            {one: byte for byte, one in enumerate(byte_alphabet())},
            self.backend.get_added_tokens_decoder(),
        )
        for token, number in self.backend.get_vocab().items() if self.is_byte_level else ():
            content = token.encode() if number in added else bytes(byte_of[character] for character in token)
            self.table[number] = sum((byte & 0xC0) != 0x80 for byte in content), len(content)

    def __len__(self) -> int:
        return len(self.table)

    def count(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
        if self.is_byte_level:
            characters, size = np.bincount(ids, minlength=len(self.table)) @ self.table
            return int(characters), int(size)
        documents = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
        texts = self.backend.decode_batch(documents, skip_special_tokens=False)
        return sum(map(len, texts)), sum(len(text.encode()) for text in texts)
