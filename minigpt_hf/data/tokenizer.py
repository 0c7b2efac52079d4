"""Create or load a tokenizer: byte-level BPE, characters, bytes, or an existing one.

The tokenizers created here are `PreTrainedTokenizerFast` and load with `AutoTokenizer`. They are lossless:
`decode(encode(text)) == text`; a character tokenizer raises an error for characters outside its vocabulary.
`lost_characters` detects what an existing tokenizer loses.

`<|endoftext|>` (id 0) is the BOS and EOS token, as in GPT-2. `<|pad|>` (id 1) is a separate token, so that EOS labels are
never mistaken for padding and ignored by a loss.
"""

import hashlib
import logging
import unicodedata
from collections.abc import Container, Iterable, Iterator
from functools import cached_property

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import MiniGPTError
from ..trust import checked_folder, loading
from .chunking import CHUNK_CHARACTERS, INSIDE_RUN, split_into_chunks

logger = logging.getLogger(__name__)

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

# The pre-tokenizer of Qwen2: contractions, words with an optional leading character, single digits, punctuation, line ends,
# other white space. llama.cpp, vLLM and other engines recognize exactly this pattern. (Qwen2 also normalizes to NFC, which
# is omitted here because it is not lossless.)
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

# A longer word, such as DNA without line ends, is encoded in windows, and its merges are learned from a sample.
LONG_WORD = 3 * CHUNK_CHARACTERS
SAMPLE_CHARACTERS = 1000  # length of a sample
MAX_SAMPLES = 1000  # of all long words; training time grows more than linearly with the length of a word
OVERLAP = 1000  # characters shared by two consecutive windows


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        vocab_size: 2 special tokens, 256 bytes, and merges. The vocabulary is smaller if the text has too few pairs that
            occur twice.

    Raises:
        MiniGPTError: if `vocab_size` is smaller than 258.
    """
    minimum = 2 + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < minimum:
        raise MiniGPTError(
            f"vocab_size is {vocab_size}: byte-level BPE needs at least {minimum} (2 special tokens and 256 bytes)"
        )
    tokenizer = _byte_level_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_chunks(texts), trainer=trainer)
    return with_special_tokens(tokenizer)


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    """Yield the chunks of all texts; of words longer than `LONG_WORD`, evenly spaced samples."""
    samples, every, number, characters = [], 1, 0, 0
    for _, chunk in split_into_chunks((True, text) for text in texts):
        if len(chunk) <= LONG_WORD:
            yield chunk
            continue
        characters += len(chunk)
        for start in range(0, len(chunk), SAMPLE_CHARACTERS):
            if number % every == 0:
                samples.append(chunk[start : start + SAMPLE_CHARACTERS])
            if len(samples) > MAX_SAMPLES:
                samples, every = samples[::2], 2 * every
            number += 1
    yield from samples
    if characters:
        logger.info(
            "the text has words of more than %s characters: merges are learned from %s of their %s characters",
            f"{LONG_WORD:,}",
            f"{sum(map(len, samples)):,}",
            f"{characters:,}",
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte: BPE without merges. Byte b has id b + 2."""
    # `ByteLevel` represents each byte by a printable character: the byte's own if it has one, otherwise 256, 257, …
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    substitutes = iter(range(256, 512))
    vocab = {END_OF_TEXT: 0, PAD: 1}
    vocab |= {chr(byte if byte in printable else next(substitutes)): byte + 2 for byte in range(256)}
    return with_special_tokens(_byte_level_tokenizer(models.BPE(vocab=vocab, merges=[])))


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character that occurs in `texts`, in the order of code points."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocab = {token: i for i, token in enumerate([END_OF_TEXT, PAD, *sorted(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab))  # without an `unk` token, so unknown characters are an error
    tokenizer.pre_tokenizer = CHARACTER_PRE_TOKENIZER
    tokenizer.decoder = decoders.Fuse()
    return with_special_tokens(tokenizer)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load an existing tokenizer without executing remote code.

    Args:
        folder: A folder or Hub id.

    Raises:
        MiniGPTError: if there is no tokenizer, it requires remote code, it is not a fast tokenizer, or it has no EOS token.
    """
    path = checked_folder(folder, what="tokenizer", with_weights=False)
    with loading(
        folder, "tokenizer", "give `bpe`, `characters`, `bytes`, or a folder or Hub id that holds a tokenizer"
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise MiniGPTError(f"tokenizer {folder}: it needs a `tokenizer.json` and an `eos_token` to separate documents")
    return tokenizer


def lost_characters(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """Describe what is lost when texts are encoded and decoded; None if nothing is."""
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    tokens = unknown = 0
    changed: list[tuple[str, str]] = []
    for text in texts:
        try:
            ids = np.asarray(encoder(text), dtype=np.int64)
        except ValueError:  # an unknown character, which is reported when the entire text is encoded
            return None
        tokens += len(ids)
        unknown += int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
        decoded = tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if decoded != text:
            changed.append((text, decoded))
    if not changed and not unknown:
        return None
    categories = {
        "upper case": str.isupper,
        "white space": str.isspace,
        "accents": lambda character: unicodedata.combining(character) > 0,
    }
    before, after = (unicodedata.normalize("NFD", "".join(side)) for side in zip(*changed, strict=True))
    lost = [name for name, belongs in categories.items() if sum(map(belongs, before)) != sum(map(belongs, after))]
    description = f"{', '.join(lost or ['characters'])} lost or changed"
    return f"{unknown / max(tokens, 1):.2%} of the tokens are unknown; {description}" if unknown else description


def unknown_character_error(text: str, vocabulary: Container[str], what: str) -> MiniGPTError | None:
    """Return the error for the first character of a text that a character tokenizer does not know; None if it knows all.

    Args:
        what: Subject of the message, e.g. "the prompt".
    """
    for character in text:
        if character not in vocabulary:
            return MiniGPTError(
                f"{what} has a character that the tokenizer does not know: {character!r} (U+{ord(character):04X}); remove "
                "it, or train with `--tokenizer bpe` or `bytes`, which encode every character"
            )
    return None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the required number of rows of an embedding matrix: the largest id + 1, because ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that precedes each document: BOS, or EOS for a tokenizer without BOS."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines which ids a text has.

    Truncation and padding are excluded: they are set by each call of a tokenizer and saved with it.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(f"{backend.to_str()} {tokenizer.eos_token_id}".encode()).hexdigest()


def tokenizer_mismatch(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a description if a configuration records another tokenizer than the given one, otherwise None."""
    recorded = getattr(config, "tokenizer_fingerprint", None)
    if recorded is None or not tokenizer.is_fast or tokenizer_fingerprint(tokenizer) == recorded:
        return None
    return (
        "has another tokenizer than the one that the model was trained with: restore tokenizer.json, or, if the change is "
        "intended, remove tokenizer_fingerprint from config.json"
    )


class Encoder:
    """Encodes text to ids, in bounded memory and without recognizing special tokens in the text.

    Args:
        tokenizer_json: `tokenizer.backend_tokenizer.to_str()`, a form that can be sent to other processes.
    """

    def __init__(self, tokenizer_json: str):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
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

    def split_into_chunks(self, parts: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        """Split text into chunks that can be encoded independently; entire documents if the pre-tokenizer is not known."""
        if self.boundaries:
            return split_into_chunks(parts, anywhere=self.boundaries == "anywhere")
        return split_into_chunks(parts, entire_documents=True)

    def __call__(self, text: str) -> list[int] | np.ndarray:
        if len(text) > LONG_WORD and self.supports_windows:
            return self._encode_in_windows(text)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        try:
            # `encode_batch_fast` does not compute the offsets of tokens and takes half the time of `encode`.
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # `tokenizers` raises a bare `Exception` for a word without an id
            if unknown := unknown_character_error(text, self.tokenizer.get_vocab(), "the text"):
                raise unknown from error
            raise

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
        return np.array(self._encode(text[start:stop]), dtype=np.uint32), stop

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


def _byte_level_tokenizer(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = BYTE_LEVEL_PRE_TOKENIZER
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _serialized(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """Return the JSON representation of a pre-tokenizer, for comparison."""
    return pre_tokenizer.__getstate__().decode()


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers and add the special tokens."""
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(PAD, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
