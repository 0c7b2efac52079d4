"""A corpus -> a text that is ready to train on: a tokenizer and two token streams.

In: a `Corpus`, and which tokenizer. Out: a `PreparedText`. Tokenizers and streams are found again by what they were made
from, so a second start takes a blink. It refuses nothing that `tokenizer` does not.

A prepared text can be saved as a folder, which does not need the corpus and may be shared by several machines:
    prepared.json    version of this format; name, cut and kind of tokenizer; the settings that the text was read with
    tokenizer/       as `from_pretrained` reads it
    train/           a stream
    validation/      a stream, if there is validation
    manifest.json    size and SHA-256 of each file
"""

import errno
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..atomic import MANIFEST, publish, remove_abandoned, seal, temporary_directory
from ..errors import MiniGPTError
from .cache import cached, damage
from .corpus import CACHE, Corpus, public
from .documents import Texts
from .stream import TokenStream, build_stream
from .tokenizer import (
    byte_level_bpe,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    what_is_lost,
    with_special_tokens,
)

logger = logging.getLogger(__name__)

# Below this many tokens the sampling error of a validation loss exceeds 0.03 nats per token, if the losses of single tokens
# have a standard deviation of about 3 nats.
FEWEST_TOKENS_FOR_A_SCORE = 10_000
STANDARD_DEVIATION_OF_A_TOKEN = 3.0

# Merges are learnt from so much text, taken from all over it: more changes no merge that matters.
BPE_CHARACTERS = 100_000_000
# What an existing tokenizer is tried on: so many characters from all documents, in excerpts of whole windows.
CHECKED_CHARACTERS, CHECKED_WINDOW = 100_000, 1000
VERSION = 3  # of the format of a prepared text; 1 had no manifest, 2 no settings
REMEDY = "create it again with `minigpt tokenize`"
# The settings that decide what a prepared text consists of, apart from the text itself. (Those of its tokens that are scored
# for validation also depend on the length of a window, which `ValidationSample` has.)
TEXT_SETTINGS = (
    *("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format", "streaming", "max_tokens"),
    *("validation_fraction", "validation_characters", "tokenizer", "vocab_size"),
)


@dataclass(frozen=True)
class ValidationSample:
    """How much of the held-out text is scored. The totals of a stream are unknown: `None`.

    Args:
        window: Length of a window in characters, in multiples of which excerpts were chosen (see `Texts.sample`).
    """

    documents: int
    of_documents: int | None
    characters: int
    of_characters: int | None
    window: int

    def __str__(self) -> str:
        if self.of_characters is None:
            return f"{self.characters:,} characters of {self.documents:,} documents of the stream"
        if self.characters == self.of_characters:
            return f"all {self.characters:,} characters"
        return (
            f"{self.characters:,} of {self.of_characters:,} characters, excerpts from {self.documents:,} of "
            f"{self.of_documents:,} documents"
        )


@dataclass(frozen=True)
class PreparedText:
    """What a training needs to know of its text. `cut` says in words what is held out, `kind` which tokenizer it is.

    `lossy` says what the tokenizer loses of the text; `None` if the text can be had back from its tokens.
    """

    name: str
    cut: str
    kind: str
    lossy: str | None
    tokenizer: PreTrainedTokenizerBase
    train: TokenStream
    validation: TokenStream | None
    scored: ValidationSample | None

    @classmethod
    def open(cls, folder: Path, cache_dir: Path = CACHE) -> "PreparedText":
        """One that `keep` wrote, verified against its manifest.

        Args:
            cache_dir: Remembers which files have been verified.

        Raises:
            MiniGPTError: if it is damaged, or of another version of the format.
        """
        about = _read_about(folder)
        if (fault := damage(folder, cache_dir)) is not None:
            raise MiniGPTError(f"{folder}: this prepared text is damaged ({fault}): {REMEDY}")
        try:
            del about["settings"]
            scored = about.pop("scored")
            text = cls(
                **about,
                scored=None if scored is None else ValidationSample(**scored),
                train=TokenStream.open(folder / "train"),
                validation=TokenStream.open(folder / "validation") if (folder / "validation").is_dir() else None,
                tokenizer=load_tokenizer(str(folder / "tokenizer")),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MiniGPTError(f"{folder}: this prepared text cannot be read ({error}): {REMEDY}") from error
        ours = tokenizer_fingerprint(text.tokenizer)[:16]
        for stream in (text.train, text.validation):
            if stream is not None and ours not in stream.fingerprint.split("-"):
                raise MiniGPTError(f"{folder}: {stream.folder.name}/ was not made with tokenizer/: {REMEDY}")
        return text

    def keep(self, folder: Path, settings: dict[str, Any]) -> None:
        """Save it as a folder, atomically.

        Args:
            settings: The `TEXT_SETTINGS` that it was made with; see `prepared_settings`.

        Raises:
            MiniGPTError: if `folder` exists.
            OSError: if it cannot be written; nothing is left of it.
        """
        exists = MiniGPTError(f"{folder}: exists already; name another folder, or remove it")
        if folder.exists():
            raise exists
        # On another machine nothing tells a path from a name, so only what may be published is stored.
        about = {"version": VERSION, "name": public(self.name), "cut": self.cut, "kind": public(self.kind)}
        about["lossy"] = self.lossy
        about["settings"] = {name: settings[name] for name in TEXT_SETTINGS} | {"tokenizer": public(self.kind)}
        about["scored"] = None if self.scored is None else asdict(self.scored)
        created = [parent for parent in folder.absolute().parents if not parent.exists()]
        try:
            remove_abandoned(folder.parent)
            with temporary_directory(folder.parent) as temporary:
                content = temporary / "content"
                content.mkdir()
                self.tokenizer.save_pretrained(content / "tokenizer")
                for name, stream in (("train", self.train), ("validation", self.validation)):
                    if stream is not None:
                        shutil.copytree(stream.folder, content / name, ignore=shutil.ignore_patterns(MANIFEST))
                (content / "prepared.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
                seal(content)
                if not publish(content, folder):
                    raise exists
        except OSError as error:
            for parent in created:  # innermost first
                with suppress(OSError):  # another process may use it, too
                    parent.rmdir()
            if error.errno != errno.ENOSPC and "No space left" not in str(error):
                raise
            raise OSError(
                errno.ENOSPC, f"{folder}: no space left on this disk; free some, or name another folder"
            ) from error


def is_prepared(data: str) -> bool:
    """Whether this is a folder that `minigpt tokenize` wrote."""
    return (Path(data) / "prepared.json").is_file()


def prepared_settings(folder: Path) -> dict[str, Any]:
    """The `TEXT_SETTINGS` that a prepared text was made with. (`PreparedText.open` verifies that they are unchanged.)

    Raises:
        MiniGPTError: if they cannot be read, or are of another version of the format.
    """
    try:
        settings = _read_about(folder)["settings"]
        return {name: settings[name] for name in TEXT_SETTINGS}
    except (KeyError, TypeError) as error:
        raise MiniGPTError(f"{folder}: this prepared text has no settings ({error}): {REMEDY}") from error


def _read_about(folder: Path) -> dict[str, Any]:
    """The content of `prepared.json`, without the version."""
    try:
        about = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        version = about.pop("version", 1)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MiniGPTError(f"{folder}: this prepared text cannot be read ({error}): {REMEDY}") from error
    if version != VERSION:
        raise MiniGPTError(f"{folder}: this prepared text has format {version}, and {VERSION} is required: {REMEDY}")
    return about


def prepare(
    corpus: Corpus,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
    *,
    block_size: int,
    validation_characters: int,
    num_proc: int | None = None,
    max_tokens: int | None = None,
) -> PreparedText:
    """Learn or load a tokenizer, and encode the corpus with it.

    Args:
        tokenizer: `bpe`, `characters`, `bytes`, or a folder or Hub id.
        vocab_size: Tokens that `bpe` learns, at most.
        cache_dir: Where tokenizers and streams are kept and looked for.
        block_size: Length of a window in tokens. If only a part of the validation text is scored, it consists of windows.
        validation_characters: Number of characters of the validation text to score, sampled from all its documents.
        num_proc: Processes that encode; default: one for each core.
        max_tokens: Take at most this many tokens of the training text; see `build_stream`.
    """
    chosen = make_tokenizer(corpus, tokenizer, vocab_size, cache_dir)
    lossy = None if tokenizer in ("bpe", "characters", "bytes") else report_what_is_lost(chosen, corpus.train)
    with tqdm(
        total=corpus.train.characters, desc="tokenizing", unit=" characters", unit_scale=True, delay=2, leave=False
    ) as bar:
        train = build_stream(corpus.train, chosen, cache_dir, num_proc, bar.update, max_tokens)
    if len(train) == len(train.documents):
        held_out = "nothing" if corpus.validation is None else f"{corpus.validation.characters or 0:,} characters"
        limit = "" if max_tokens is None else f", and max_tokens is {max_tokens:,}"
        raise MiniGPTError(
            f"{corpus.name}: no text is left to train on: there are {corpus.train.characters or 0:,} characters of it, "
            f"{held_out} held out for validation{limit}; give more text, or a lower --validation_fraction"
        )
    validation = scored = None
    if corpus.validation is not None:
        window = max(1, round(block_size * train.characters / (len(train) - len(train.documents))))
        sampled = corpus.validation.sample(validation_characters, window)
        validation = build_stream(sampled, chosen, cache_dir, num_proc)
        if not len(validation):
            raise MiniGPTError(
                f"{corpus.name}: nothing of it is held out for validation; raise --validation_fraction, or 0"
            )
        scored = ValidationSample(
            sampled.number_of_documents or len(validation.documents),
            corpus.validation.number_of_documents,
            validation.characters,
            corpus.validation.characters,
            window,
        )
        warn_about_a_small_sample(
            len(validation) - len(validation.documents),
            validation.bytes,
            "give more text, or raise --validation_fraction or --validation_characters",
        )
    return PreparedText(corpus.name, corpus.cut, tokenizer, lossy, chosen, train, validation, scored)


def report_what_is_lost(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> str | None:
    """What a tokenizer loses of a sample of the text, as a sentence for log and model folder; or `None`."""
    sample = texts.sample(CHECKED_CHARACTERS, CHECKED_WINDOW)
    if (lost := what_is_lost(tokenizer, sample)) is None:
        return None
    sentence = (
        f"the tokenizer does not reproduce the text ({lost}, in a sample of about {CHECKED_CHARACTERS:,} characters): bits "
        "per byte refer to the original bytes and are not comparable with those of a tokenizer that reproduces it"
    )
    logger.warning("%s, such as --tokenizer bpe", sentence)
    return sentence


def warn_about_a_small_sample(tokens: int, size: int, remedy: str) -> None:
    """Say how far a score of so few tokens, of `size` bytes, may be off."""
    if tokens < FEWEST_TOKENS_FOR_A_SCORE:
        error = STANDARD_DEVIATION_OF_A_TOKEN / math.sqrt(max(tokens, 1))
        logger.warning(
            "the validation score rests on only %s tokens (%s bytes): expect a standard error of about %.2f nats per token; "
            "for a more reliable score %s",
            f"{tokens:,}",
            f"{size:,}",
            error,
            remedy,
        )


def make_tokenizer(corpus: Corpus, tokenizer: str, vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Learn a tokenizer from the training text, or take an existing one."""
    if tokenizer == "bytes":
        return byte_tokenizer()
    if tokenizer == "bpe":
        learn = lambda: byte_level_bpe(corpus.train.evenly(BPE_CHARACTERS), vocab_size)  # noqa: E731
        return _kept(cache_dir, learn, f"bpe {vocab_size}", corpus.train)
    if tokenizer == "characters":
        # Of the validation text, too: that a character exists gives nothing away, and one without an id would end it all.
        texts = [part for part in (corpus.train, corpus.validation) if part is not None]
        learn = lambda: character_tokenizer(piece for text in texts for _, piece in text.parts())  # noqa: E731
        return _kept(cache_dir, learn, "characters", *texts)
    return load_tokenizer(tokenizer)


def _kept(
    cache_dir: Path, learn: Callable[[], PreTrainedTokenizerBase], kind: str, *texts: Texts
) -> PreTrainedTokenizerBase:
    """What was learnt from the same text before, or else now."""
    name = hashlib.sha256(" ".join([kind, *(text.fingerprint for text in texts)]).encode()).hexdigest()[:32]
    return cached(
        cache_dir / "tokenizers" / name,
        lambda folder: learn().backend_tokenizer.save(str(folder / "tokenizer.json")),
        lambda folder: with_special_tokens(Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())),
        cache_dir,
        "tokenizer",
    )
