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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import MiniGPTError
from ..trust import checked_folder, loading
from .chunking import split_into_chunks
from .encoding import BYTE_LEVEL_PRE_TOKENIZER, CHARACTER_PRE_TOKENIZER, LONG_WORD, Encoder, byte_alphabet

logger = logging.getLogger(__name__)

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

SAMPLE_CHARACTERS = 1000  # length of a sample of a long word
MAX_SAMPLES = 1000  # samples of all long words; training time grows more than linearly with the length of a word


def byte_level_bpe(texts: Iterable[str], vocab_size: int, reserved: int = 0) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; on bytes: Radford et al. 2019).

    Args:
        vocab_size: 2 special tokens, 256 bytes, and merges. The vocabulary is smaller if the text has too few pairs that
            occur twice.
        reserved: Part of `vocab_size` that is left for special tokens to be added.

    Raises:
        MiniGPTError: if `vocab_size` is smaller than 258 + `reserved`.
    """
    special = 2 + reserved
    minimum = special + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < minimum:
        raise MiniGPTError(
            f"vocab_size is {vocab_size}: byte-level BPE needs at least {minimum} ({special} special tokens and 256 bytes)"
        )
    tokenizer = _byte_level_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - reserved,
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
    vocab = {END_OF_TEXT: 0, PAD: 1}
    vocab |= {character: byte + 2 for byte, character in enumerate(byte_alphabet())}
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


def appended_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that the post-processor of a tokenizer with an EOS token appends to every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    encoding = backend.encode(tokenizer.eos_token)  # a text that every tokenizer can encode
    is_added = encoding.special_tokens_mask
    of_text = [position for position, added in enumerate(is_added) if not added]
    return encoding.tokens[of_text[-1] + 1 :] if of_text else []


def special_tokens_in_text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens that a tokenizer recognizes in a text, because they are words of its vocabulary.

    The option `encode_special_tokens` does not prevent this: a Unigram or word-level model finds them as words.
    """
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    found = []
    for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if token == tokenizer.unk_token:  # also stands for other text
            continue
        with suppress(MiniGPTError):  # a character tokenizer does not know its characters
            if number in encoder(f"{token} {token}"):
                found.append(token)
    return found


def lost_characters(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str | None:
    """Describe what is lost when texts are encoded and decoded; None if nothing is."""
    encode, decode = _codec(tokenizer)
    tokens = unknown = 0
    changed: list[tuple[str, str]] = []
    for text in texts:
        try:
            ids = encode(text)
        except ValueError:  # an unknown character, which is reported when the entire text is encoded
            return None
        tokens += len(ids)
        unknown += int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
        if (decoded := decode(ids.tolist())) != text:
            changed.append((text, decoded))
    if not changed:  # even if a character of the text is the unknown token
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


def _codec(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Callable[[str], np.ndarray], Callable[[list[int]], str]]:
    """Return functions that encode a text as ordinary text, and decode ids, also for a tokenizer that is Python code."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        return Encoder(backend.to_str()), lambda ids: backend.decode(ids, skip_special_tokens=False)

    def encode(text: str) -> np.ndarray:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        return np.array(ids, dtype=np.int64)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return encode, decode


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
    if recorded is None or not tokenizer.is_fast:
        return None
    expected, found = config.bos_token_id, tokenizer.bos_token_id
    if tokenizer_fingerprint(tokenizer) != recorded:
        detail, file = "", "tokenizer.json"
    elif None not in (expected, found) and expected != found:  # the fingerprint includes the EOS token only
        detail, file = f" (BOS token {found} instead of {expected})", "tokenizer_config.json"
    else:
        return None
    return (
        f"has another tokenizer than the one that the model was trained with{detail}: restore {file}, or, if the change is "
        "intended, remove tokenizer_fingerprint from config.json"
    )


def _byte_level_tokenizer(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = BYTE_LEVEL_PRE_TOKENIZER
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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
