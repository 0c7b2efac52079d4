"""Documents -> a tokenizer: byte-level BPE, characters, bytes, or one that exists.

In: texts. Out: a `PreTrainedTokenizerFast` that loads with plain `AutoTokenizer`. It refuses to lose anything:
`decode(encode(text)) == text` for every text, and the character tokenizer names a character that it does not know.

`<|endoftext|>` (id 0) is both `bos` and `eos`, as in GPT-2; `<|pad|>` (id 1) is a token of its own, so that no loss ever
mistakes the end of a text for padding.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..trust import checked_folder, loading

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

# No match of PATTERN reaches from a line end into the next line, unless that is blank. So a text may be cut there, and its
# pieces encoded one by one, with the same result.
SAFE_CUT = re.compile(r"\n(?=[^\S\r\n]*\S)")
PIECE_CHARACTERS = 100_000  # long enough to keep a process busy for some 50 ms, short enough to keep memory flat


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn merges: start from the 256 bytes, join the most frequent pair into a new token, again and again.

    Args:
        vocab_size: 2 special tokens, 256 bytes, and the rest merges. A small corpus may not hold that many pairs that
            occur twice; then the tokenizer is smaller.

    Raises:
        ValueError: if `vocab_size` has no room for the bytes.
    """
    smallest = 2 + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(
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
    tokenizer.train_from_iterator((piece for _, piece in pieces((True, text) for text in texts)), trainer=trainer)
    return with_special_tokens(tokenizer)


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
        ValueError: if there is none, if it needs code of its own, if it is not a fast one, or if it has no end-of-text token.
    """
    path = checked_folder(folder, what="tokenizer", with_weights=False)
    with loading(
        folder, "tokenizer", "give `bpe`, `characters`, `bytes`, or a folder or Hub id that holds a tokenizer"
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {folder}: it needs a `tokenizer.json` and an `eos_token` to separate documents")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows an embedding needs: ids of an existing tokenizer may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text gets."""
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token_id}".encode()).hexdigest()


def pieces(
    parts: Iterable[tuple[bool, str]], anywhere: bool = False, whole: bool = False
) -> Iterator[tuple[bool, str]]:
    """Cut (or join) parts of documents where that changes no token: after a line end, or anywhere if each token is one unit.

    In and out come (does it open a document?, text); documents without text are left out. `whole` only joins.
    """
    opens, rest = True, ""
    for opens_document, text in parts:
        if opens_document and rest:
            yield opens, rest
        opens, rest = (True, text) if opens_document else (opens, rest + text)
        while len(rest) > PIECE_CHARACTERS and not whole:
            stop = PIECE_CHARACTERS
            if not anywhere:
                safe = SAFE_CUT.search(rest, stop)
                if safe is None:
                    break
                stop = safe.end()
            yield opens, rest[:stop]
            opens, rest = False, rest[stop:]
    if rest:
        yield opens, rest


class Encoder:
    """Text -> ids, for one process. Text that spells a special token stays text.

    Built from `tokenizer.backend_tokenizer.to_str()`, so that it travels to other processes as a string.
    """

    def __init__(self, tokenizer_json: str):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        cutters = {_described(EACH_CHARACTER): "anywhere", _described(WORDS_OF_BYTES): "at line ends"}
        self.may_cut = None
        if self.tokenizer.normalizer is None and self.tokenizer.pre_tokenizer is not None:
            self.may_cut = cutters.get(_described(self.tokenizer.pre_tokenizer))

    def pieces(self, parts: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        """The text in parts that can be encoded one by one; documents whole, if this tokenizer is not one of ours."""
        if self.may_cut:
            return pieces(parts, anywhere=self.may_cut == "anywhere")
        return pieces(parts, whole=True)

    def __call__(self, piece: str) -> list[int]:
        try:
            # Not `encode`, which also computes where in the text each token stands, and takes twice as long.
            return self.tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
            for character in piece:
                if self.tokenizer.token_to_id(character) is None:
                    raise ValueError(
                        f"the tokenizer does not know the character {character!r} (U+{ord(character):04X}): it was made "
                        "from text that has none; leave it out, or use `--tokenizer bpe` or `bytes`, which know all"
                    ) from error
            raise


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
