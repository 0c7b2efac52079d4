"""Encode text to token ids: the ids of `tokenizers`, computed by the fastest engine that is available.

Byte-level BPE tokenizers of this package are encoded by the first of these engines that gives the ids of `tokenizers` on
difficult strings and on the beginning of the text (see `fastest_encoder`):
    fastokens     installed by the extra `fast`
    tiktoken      with the merges of the tokenizer as ranks
    tokenizers    the reference
Tokenizers whose words are single characters or bytes need only a table. Any other tokenizer is encoded by `tokenizers`.
"""

import json
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ..errors import MiniGPTError
from .chunking import CHUNK_CHARACTERS, INSIDE_RUN, split_into_chunks

logger = logging.getLogger(__name__)

# The pre-tokenizer of Qwen2: contractions, words with an optional leading character, single digits, punctuation, line
# endings, other white space. llama.cpp, vLLM and other engines recognize exactly this pattern. (Qwen2 also normalizes to
# NFC, which is omitted here because it is not lossless.)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_PRE_TOKENIZER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
CHARACTER_PRE_TOKENIZER = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")

# A longer word, such as DNA without line endings, is encoded in windows, and its merges are learned from a sample.
LONG_WORD = 3 * CHUNK_CHARACTERS
OVERLAP = 1000  # characters shared by two consecutive windows

# Encodes each of several texts to ids, uint32. May be called by several threads at the same time.
Engine = Callable[[list[str]], list[np.ndarray]]


class Encoder:
    """Encodes text to ids, in bounded memory and without recognizing special tokens in the text.

    Several threads may use the same encoder.

    Args:
        tokenizer_json: `tokenizer.backend_tokenizer.to_str()`.
        engine: A key of `FAST_ENGINES`, for byte-level BPE; default: `tokenizers`.

    Raises:
        ImportError: if the engine is not installed.
        ValueError: if the engine cannot represent the tokenizer.
    """

    def __init__(self, tokenizer_json: str, engine: str | None = None):
        self.tokenizer = _configured(tokenizer_json)
        # Where text may be split: "anywhere", "at words" (see `chunking`), or nowhere for other tokenizers.
        boundaries = {
            _serialized(CHARACTER_PRE_TOKENIZER): "anywhere",
            _serialized(BYTE_LEVEL_PRE_TOKENIZER): "at words",
        }
        self.boundaries = None
        # Added tokens that are not special are matched before the pre-tokenizer runs, even across word boundaries.
        added = self.tokenizer.get_added_tokens_decoder().values()
        if (
            self.tokenizer.normalizer is None
            and self.tokenizer.pre_tokenizer is not None
            and all(token.special for token in added)
        ):
            self.boundaries = boundaries.get(_serialized(self.tokenizer.pre_tokenizer))
        model = self.tokenizer.model
        self.supports_windows = self.boundaries == "at words" and isinstance(model, models.BPE) and not model.dropout
        # The merges of a byte-level BPE tokenizer; None for other tokenizers.
        self.merges = _byte_level_merges(model) if self.supports_windows else None
        words = self.tokenizer.get_vocab(with_added_tokens=False)
        self._engine = _tokenizers_engine(tokenizer_json)
        if self.boundaries == "anywhere" and isinstance(model, models.WordLevel):
            self._engine = _character_table(words, model.unk_token)
        elif self.merges == []:
            self._engine = _byte_table(words)
        elif engine is not None:
            assert self.merges is not None, "only byte-level BPE has other engines"
            self._engine = FAST_ENGINES[engine](self.tokenizer, self.merges)

    def split_into_chunks(self, parts: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        """Split text into chunks that can be encoded independently; entire documents if the pre-tokenizer is not known."""
        if self.boundaries:
            return split_into_chunks(parts, anywhere=self.boundaries == "anywhere")
        return split_into_chunks(parts, entire_documents=True)

    def __call__(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each of several texts."""
        if self.supports_windows and any(len(text) > LONG_WORD for text in texts):
            return [self._encode_in_windows(text) if len(text) > LONG_WORD else self._encode(text) for text in texts]
        return self._engine(texts)

    def _encode(self, text: str) -> np.ndarray:
        return self._engine([text])[0]

    def _encode_in_windows(self, text: str) -> np.ndarray:
        """Return the ids of a long text, using memory that does not depend on the length of its words.

        BPE applies the merge of lowest rank first, and the leftmost of equal ones. Whether a merge crosses a position depends
        only on the two tokens that meet there and on the merges that produced them. If two overlapping windows of a word
        contain the same token at the same position, the tokens of the first window up to it, followed by those of the second
        window from it on, are therefore the tokens of the word: the first window shows that no merge crosses the start of
        this token, the second that none crosses its end.

        Each window starts at a token of the previous window, and its first token is compared with that token. If they differ,
        the previous window is enlarged; if this changes the token that it shares with the window before, that one is
        enlarged too.
        """
        # For each earlier window: ids before the token shared with the next window, this token, start and size.
        finished: list[tuple[np.ndarray, int, int, int]] = []
        start, size = 0, CHUNK_CHARACTERS
        ids, stop = self._encode_window(text, start, size)
        while True:
            if finished and ids[0] != finished[-1][1]:
                _, _, start, size = finished.pop()
            elif stop == len(text):
                return np.concatenate([*(before for before, *_ in finished), ids])
            else:
                index, next_start = self._next_window_start(text, ids, start, stop)
                next_ids, next_stop = self._encode_window(text, next_start, CHUNK_CHARACTERS) if index else (ids, stop)
                if index and next_ids[0] == ids[index]:
                    finished.append((ids[:index], ids[index], start, size))
                    ids, stop, start, size = next_ids, next_stop, next_start, CHUNK_CHARACTERS
                    continue
            size *= 2
            ids, stop = self._encode_window(text, start, size)

    def _encode_window(self, text: str, start: int, size: int) -> tuple[np.ndarray, int]:
        """Return ids and end of a window of at least `size` characters that ends inside a run or at the end of the text."""
        end = INSIDE_RUN.search(text, start + size)
        stop = end.end() if end else len(text)
        return self._encode(text[start:stop]), stop

    def _next_window_start(self, text: str, ids: np.ndarray, start: int, stop: int) -> tuple[int, int]:
        """Find the last token of a window that starts inside a run, more than `OVERLAP` characters before the end.

        Returns:
            Index of the token in `ids`, and the position in `text` of its first character; (0, 0) if there is none.
        """
        window = np.frombuffer(text[start:stop].encode(), dtype=np.uint8)
        starts_character = (window & 0xC0) != 0x80  # other UTF-8 bytes continue a character
        characters = np.cumsum(starts_character) - 1  # index of the character of each byte
        token_starts = np.cumsum(self._bytes_per_token[ids])[:-1]  # first byte of each token except the first
        candidates = np.flatnonzero(
            starts_character[token_starts] & (characters[token_starts] < stop - start - OVERLAP)
        )
        for candidate in candidates[::-1]:
            position = start + int(characters[token_starts[candidate]])
            if INSIDE_RUN.match(text, position):
                return int(candidate) + 1, position
        return 0, 0

    @cached_property
    def _bytes_per_token(self) -> np.ndarray:
        """Number of bytes of each id [vocabulary size]; the byte-level alphabet has one character per byte."""
        vocabulary = self.tokenizer.get_vocab()
        sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, number in vocabulary.items():
            sizes[number] = len(token)
        return sizes


# -- engines ----------------------------------------------------------------------------------------------------------


def fastest_encoder(tokenizer_json: str, texts: list[str]) -> Encoder:
    """Return an encoder with the fastest engine that gives the ids of `tokenizers`, and log why others are not used.

    Args:
        texts: Texts that are encoded for the comparison, in addition to `difficult_texts`.
    """
    reference = Encoder(tokenizer_json)
    if not reference.merges or not _encodes_tokens_as_themselves(reference.tokenizer):
        return reference
    samples = [*difficult_texts(), *texts]
    expected = reference.encode_batch(samples)
    chosen, name, rejected = reference, "tokenizers", []
    for candidate in FAST_ENGINES:
        try:
            encoder = Encoder(tokenizer_json, candidate)
            if all(map(np.array_equal, encoder.encode_batch(samples), expected)):
                chosen, name = encoder, candidate
                break
            rejected.append(f"{candidate} {version(candidate)} gives other ids")
        except ImportError:
            rejected.append(f"{candidate} is not installed")
        except Exception as error:  # compiled code raises exceptions of any type
            rejected.append(f"{candidate} {version(candidate)} does not support this tokenizer ({_first_line(error)})")
    if rejected:
        logger.info("encoding with %s: %s (the extra `fast` installs the fastest encoder)", name, ", ".join(rejected))
    return chosen


def _encodes_tokens_as_themselves(tokenizer: Tokenizer) -> bool:
    """Whether the merges produce every token except added ones, as in a vocabulary trained by `tokenizers`."""
    tokens = _tokens(tokenizer)
    alone = Tokenizer(tokenizer.model).encode_batch_fast(list(tokens))
    return all(encoding.ids == [number] for encoding, number in zip(alone, tokens.values(), strict=True))


def _tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the vocabulary of a tokenizer without added tokens."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return {token: number for token, number in vocabulary.items() if token not in added}


def difficult_texts() -> list[str]:
    """Return texts in which the words of the pre-tokenizer are easily confused; always the same."""
    source = random.Random(0)
    texts = ["".join(source.choices(DIFFICULT, k=source.randint(1, 30))) for _ in range(3000)]
    return texts + [character * 2000 for character in ("A", "=", " ", "\n", "\r\n", "中", "é", "0", " \t", "👍🏽")]


# One or more characters of each class of the pre-tokenizer's pattern, and strings at the boundaries of classes.
DIFFICULT = [
    *"aZzſKİıß'’\"=;.-_(){}019²Ⅷ٣½",
    *" \t\n\r\v\f\0\x1c\x1f\x85\xa0\xad\u180e\u2028\u200b\u200d\u3000\ufeff\u0301\u0300éñяא中々〇、。！ア",
    *["'s", "'S", "'re", "'LL", "'ſ", "''", " '", "don't", "we'll", "\r\n", "\n\n", "  ", "   ", "\n  ", "  \n"],
    *["e\u0301", "👍🏽", "🇩🇪", "𝐀", "\U0001e030", "\U000323af", "\U0010ffff", "the", " The", "12345", "x=1;", "===="],
    *["<|endoftext|>", "<|pad|>", "<|endoftext|", "pad|>"],
]


class _ThreadLocalTokenizer(threading.local):
    """A tokenizer of its own for each thread: the lock of the cache of a `Tokenizer` delays threads that share it."""

    def __init__(self, tokenizer_json: str):  # called in each thread
        self.tokenizer = _configured(tokenizer_json)


def _tokenizers_engine(tokenizer_json: str) -> Engine:
    local = _ThreadLocalTokenizer(tokenizer_json)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(_encode_text(local.tokenizer, text), dtype=np.uint32) for text in texts]

    return encode


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        # `encode_batch_fast` does not compute the offsets of tokens and takes half the time of `encode`.
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except Exception as error:  # `tokenizers` raises a bare `Exception` for a word without an id
        if unknown := unknown_character_error(text, tokenizer.get_vocab(), "the text"):
            raise unknown from error
        raise


def _fastokens_engine(tokenizer: Tokenizer, merges: list[list[str]]) -> Engine:
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # several texts are encoded at the same time instead
    import fastokens

    encoder = fastokens.Tokenizer.from_json_str(tokenizer.to_str())

    def encode(texts: list[str]) -> list[np.ndarray]:
        flat, offsets = encoder.encode_batch_flat(texts, split_special_tokens=True)
        ids = np.frombuffer(flat, "<u4")
        return [ids[start:stop] for start, stop in pairwise(np.frombuffer(offsets, "<i8").tolist())]

    return encode


def _tiktoken_engine(tokenizer: Tokenizer, merges: list[list[str]]) -> Engine:
    """Represent the merges as ranks of tokens.

    tiktoken merges two neighbors if their concatenation is a token, lowest id first. BPE does the same if the merges are in
    the order of the ids that they produce, and if each token is encoded as itself: if two neighbors could form a token
    without a merge, this token would be encoded as these two.
    """
    import tiktoken

    tokens = _tokens(tokenizer)
    produced = [tokens.get(left + right, -1) for left, right in merges]
    if produced != sorted(set(produced)):
        raise ValueError("its merges are not in the order of the ids that they produce")
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    ranks = {bytes(byte_of[character] for character in token): number for token, number in tokens.items()}
    encoding = tiktoken.Encoding("minigpt", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    fallback = _tokenizers_engine(tokenizer.to_str())

    def encode(texts: list[str]) -> list[np.ndarray]:
        try:
            return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        except ValueError:  # its regular expressions are limited to about 500,000 spaces in succession
            return fallback(texts)

    return encode


# Engines for byte-level BPE, from the fastest. Each takes a tokenizer and its merges.
FAST_ENGINES: dict[str, Callable[[Tokenizer, list[list[str]]], Engine]] = {
    "fastokens": _fastokens_engine,
    "tiktoken": _tiktoken_engine,
}


def _character_table(vocabulary: dict[str, int], unknown_token: str) -> Engine:
    """Look up the id of each code point."""
    absent = 2**32 - 1
    table = np.full(sys.maxunicode + 1, vocabulary.get(unknown_token, absent), dtype=np.uint32)
    for token, number in vocabulary.items():
        if len(token) == 1:
            table[ord(token)] = number

    def encode(texts: list[str]) -> list[np.ndarray]:
        batch = [table[np.frombuffer(text.encode("utf-32-le"), "<u4")] for text in texts]
        for text, ids in zip(texts, batch, strict=True):
            if len(ids) and ids.max() == absent:
                unknown = unknown_character_error(text, vocabulary, "the text")
                assert unknown is not None
                raise unknown
        return batch

    return encode


def _byte_table(vocabulary: dict[str, int]) -> Engine:
    """Look up the id of each byte of the UTF-8 encoding."""
    table = np.array([vocabulary[character] for character in byte_alphabet()], dtype=np.uint32)
    return lambda texts: [table[np.frombuffer(text.encode(), np.uint8)] for text in texts]


def byte_alphabet() -> list[str]:
    """Return the character by which `ByteLevel` represents each byte: its own if it has one, otherwise 256, 257, …"""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _configured(tokenizer_json: str) -> Tokenizer:
    """Return a tokenizer that treats special tokens as text and neither truncates nor pads."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_level_merges(model: models.BPE) -> list[list[str]] | None:
    """Return the merges; None if a byte has no token, or an option changes how merges are applied."""
    state = json.loads(model.__getstate__())
    options = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if any(state[name] for name in options) or not state["vocab"].keys() >= set(byte_alphabet()):
        return None
    return state["merges"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class UnknownCharacterError(MiniGPTError):
    """A text has a character that the tokenizer does not know, `character`."""

    def __init__(self, message: str, character: str):
        super().__init__(message)
        self.character = character


def unknown_character_error(text: str, vocabulary: Container[str], what: str) -> UnknownCharacterError | None:
    """Return the error for the first character of a text that a character tokenizer does not know; None if it knows all.

    Args:
        what: Subject of the message, e.g. "the prompt".
    """
    for character in text:
        if character not in vocabulary:
            return UnknownCharacterError(
                f"{what} has a character that the tokenizer does not know: {character!r} (U+{ord(character):04X}); remove "
                "it, or train with `--tokenizer bpe` or `bytes`, which encode every character",
                character,
            )
    return None


def _serialized(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """Return the JSON representation of a pre-tokenizer, for comparison."""
    return pre_tokenizer.__getstate__().decode()
