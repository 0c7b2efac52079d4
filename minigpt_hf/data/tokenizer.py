"""Documents -> a tokenizer: byte-level BPE, characters, bytes, or one that exists.

In: texts. Out: a `PreTrainedTokenizerFast` that loads with plain `AutoTokenizer`. It refuses to lose anything:
`decode(encode(text)) == text` for every text, and the character tokenizer names a character that it does not know. What an
existing tokenizer loses is found by `what_is_lost`.

`<|endoftext|>` (id 0) is both `bos` and `eos`, as in GPT-2; `<|pad|>` (id 1) is a token of its own, so that no loss ever
mistakes the end of a text for padding.
"""

import hashlib
import logging
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import MiniGPTError
from ..trust import checked_folder, loading
from .cuts import PIECE_CHARACTERS, RUN, pieces

logger = logging.getLogger(__name__)

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

# How Qwen2 cuts text into words before BPE merges bytes inside each: contractions, words with one leading character,
# single digits, runs of punctuation, line ends, other white space. Exactly this one, because llama.cpp, vLLM and every
# other engine know it. (Qwen2 also normalizes to NFC; we do not: that would lose the difference.)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_OF_BYTES = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
EACH_CHARACTER = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")

# A word longer than this, such as DNA without line ends, is encoded in windows, and its merges are learned from a sample.
LONG_WORD = 3 * PIECE_CHARACTERS
SAMPLED_CHARACTERS = 1000  # of a long word, in one place
SAMPLES = 1000  # at most, of all long words together: the trainer's time grows faster than the length of a word
OVERLAP = 1000  # characters of two windows in common


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn merges: start from the 256 bytes, join the most frequent pair into a new token, again and again.

    Args:
        vocab_size: 2 special tokens, 256 bytes, and the rest merges. A small corpus may not hold that many pairs that
            occur twice; then the tokenizer is smaller.

    Raises:
        MiniGPTError: if `vocab_size` has no room for the bytes.
    """
    smallest = 2 + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise MiniGPTError(
            f"vocab_size is {vocab_size}: byte-level BPE needs at least {smallest} (2 specials, 256 bytes)"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_for_training(texts), trainer=trainer)
    return with_special_tokens(tokenizer)


def _for_training(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of all texts; of words longer than `LONG_WORD`, a sample in equal distances."""
    sample, every, number, characters = [], 1, 0, 0
    for _, piece in pieces((True, text) for text in texts):
        if len(piece) <= LONG_WORD:
            yield piece
            continue
        characters += len(piece)
        for place in range(0, len(piece), SAMPLED_CHARACTERS):
            if number % every == 0:
                sample.append(piece[place : place + SAMPLED_CHARACTERS])
            if len(sample) > SAMPLES:
                sample, every = sample[::2], 2 * every
            number += 1
    yield from sample
    if characters:
        logger.info(
            "the text has words of more than %s characters: merges are learned from %s of their %s characters",
            f"{LONG_WORD:,}",
            f"{sum(map(len, sample)):,}",
            f"{characters:,}",
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte: BPE without a single merge. Byte b has id b + 2."""
    # ByteLevel writes each byte as a printable character: itself where it has one, and 256, 257, … where it has not.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = iter(range(256, 512))
    vocab = {END_OF_TEXT: 0, PAD: 1}
    vocab |= {chr(byte if byte in printable else next(stand_ins)): byte + 2 for byte in range(256)}
    return with_special_tokens(_byte_level(models.BPE(vocab=vocab, merges=[])))


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each character that occurs, in the order of their code points. It knows no other character."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocab = {token: i for i, token in enumerate([END_OF_TEXT, PAD, *sorted(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab))  # with no `unk` token: it fails rather than lose a character
    tokenizer.pre_tokenizer = EACH_CHARACTER
    tokenizer.decoder = decoders.Fuse()
    return with_special_tokens(tokenizer)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """An existing tokenizer: a folder, or a Hub id. No code of the folder is run.

    Raises:
        MiniGPTError: if there is none, it needs code of its own, it is not a fast one, or it has no end-of-text token.
    """
    path = checked_folder(folder, what="tokenizer", with_weights=False)
    with loading(
        folder, "tokenizer", "give `bpe`, `characters`, `bytes`, or a folder or Hub id that holds a tokenizer"
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise MiniGPTError(f"tokenizer {folder}: it needs a `tokenizer.json` and an `eos_token` to separate documents")
    return tokenizer


def what_is_lost(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """Why these texts cannot be had back from their tokens, in words; `None` if they can be."""
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    tokens = unknown = 0
    changed: list[tuple[str, str]] = []
    for text in texts:
        try:
            ids = np.asarray(encoder(text), dtype=np.int64)
        except ValueError:  # of a tokenizer that refuses what it does not know: who encodes all of the text reports it
            return None
        tokens += len(ids)
        unknown += int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
        decoded = tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if decoded != text:
            changed.append((text, decoded))
    if not changed and not unknown:
        return None
    counts = {
        "upper case": str.isupper,
        "white space": str.isspace,
        "accents": lambda character: unicodedata.combining(character) > 0,
    }
    before, after = (unicodedata.normalize("NFD", "".join(side)) for side in zip(*changed, strict=True))
    lost = [name for name, has in counts.items() if sum(map(has, before)) != sum(map(has, after))]
    lost = f"{', '.join(lost or ['characters'])} lost or changed"
    return f"{unknown / max(tokens, 1):.2%} of the tokens are unknown ones; {lost}" if unknown else lost


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows an embedding needs: ids of an existing tokenizer may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def opening_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that opens a document and separates documents: BOS, or EOS of a tokenizer without BOS."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text gets."""
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token_id}".encode()).hexdigest()


class Encoder:
    """Text -> ids, for one process. Text that spells a special token stays text.

    Built from `tokenizer.backend_tokenizer.to_str()`, so that it travels to other processes as a string.
    """

    def __init__(self, tokenizer_json: str):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        cutters = {_described(EACH_CHARACTER): "anywhere", _described(WORDS_OF_BYTES): "at words"}
        self.may_cut = None
        # A token that was added to the vocabulary is looked for before the text is split into words, even across them.
        added = self.tokenizer.get_added_tokens_decoder().values()
        if (
            self.tokenizer.normalizer is None
            and self.tokenizer.pre_tokenizer is not None
            and all(token.special for token in added)
        ):
            self.may_cut = cutters.get(_described(self.tokenizer.pre_tokenizer))
        model = self.tokenizer.model
        self.has_windows = self.may_cut == "at words" and isinstance(model, models.BPE) and not model.dropout

    def pieces(self, parts: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        """The text in parts that can be encoded one by one; documents whole, if this tokenizer is not one of ours."""
        if self.may_cut:
            return pieces(parts, anywhere=self.may_cut == "anywhere")
        return pieces(parts, whole=True)

    def __call__(self, piece: str) -> list[int] | np.ndarray:
        if len(piece) > LONG_WORD and self.has_windows:
            return self._in_windows(piece)
        return self._encode(piece)

    def _encode(self, piece: str) -> list[int]:
        try:
            # Not `encode`, which also computes where in the text each token stands, and takes twice as long.
            return self.tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
            for character in piece:
                if self.tokenizer.token_to_id(character) is None:
                    raise MiniGPTError(
                        f"the tokenizer does not know the character {character!r} (U+{ord(character):04X}): it was made "
                        "from text that has none; leave it out, or use `--tokenizer bpe` or `bytes`, which know all"
                    ) from error
            raise

    def _in_windows(self, text: str) -> np.ndarray:
        """The ids of a long text, in memory that does not depend on the length of its words.

        BPE applies the merge of lowest rank, of equal ones the leftmost. Whether a merge crosses a position depends on
        nothing but the two tokens that meet there and how they came about. So if two windows of a word have one token in
        common, at the same place, then the tokens of the first up to it and those of the second from it on are the tokens
        of the word: at its begin the first window shows that no merge crosses, at its end the second. A window begins at
        a token of the window before, and this token is compared. If it differs, the window before is enlarged; if that
        changes the token which that one in turn has in common with the one before it, so is the one before.
        """
        # Of each earlier window: its ids up to the token in common with the next, that token, its start and size.
        done: list[tuple[np.ndarray, int, int, int]] = []
        start, size = 0, PIECE_CHARACTERS
        ids, stop = self._window(text, start, size)
        while True:
            if done and ids[0] != done[-1][1]:
                _, _, start, size = done.pop()
            elif stop == len(text):
                return np.concatenate([*(before for before, *_ in done), ids])
            else:
                place, begin = self._resume_at(text, ids, start, stop)
                following, end = self._window(text, begin, PIECE_CHARACTERS) if place else (ids, stop)
                if place and following[0] == ids[place]:
                    done.append((ids[:place], ids[place], start, size))
                    ids, stop, start, size = following, end, begin, PIECE_CHARACTERS
                    continue
            size *= 2
            ids, stop = self._window(text, start, size)

    def _window(self, text: str, start: int, size: int) -> tuple[np.ndarray, int]:
        """Ids of a window of at least `size` characters, and where it ends: inside a run, or with the text."""
        end = RUN.search(text, start + size)
        stop = end.end() if end else len(text)
        return np.array(self._encode(text[start:stop]), dtype=np.uint32), stop

    def _resume_at(self, text: str, ids: np.ndarray, start: int, stop: int) -> tuple[int, int]:
        """The last token of a window that begins inside a run, `OVERLAP` before the end: its index and its place; or 0."""
        window = np.frombuffer(text[start:stop].encode(), dtype=np.uint8)
        begins_character = (window & 0xC0) != 0x80  # UTF-8: other bytes continue one
        characters = np.cumsum(begins_character) - 1  # of each byte, the index of its character
        begins = np.cumsum(self._bytes_of_tokens[ids])[:-1]  # of each token but the first, its first byte
        candidates = np.flatnonzero(begins_character[begins] & (characters[begins] < stop - start - OVERLAP))
        for candidate in candidates[::-1]:
            place = start + int(characters[begins[candidate]])
            if RUN.match(text, place):
                return int(candidate) + 1, place
        return 0, 0

    @cached_property
    def _bytes_of_tokens(self) -> np.ndarray:
        """Id -> number of bytes: the byte-level alphabet has one character for each."""
        vocabulary = self.tokenizer.get_vocab()
        sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, number in vocabulary.items():
            sizes[number] = len(token)
        return sizes


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WORDS_OF_BYTES
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _described(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """What `tokenizer.json` says of it."""
    return pre_tokenizer.__getstate__().decode()


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers takes it, with `E` and `pad`."""
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(PAD, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
