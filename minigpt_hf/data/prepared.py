"""Tokenize a corpus for training: a tokenizer and a token stream for each split.

Tokenizers and streams are cached by the content they were made from. `PreparedText.save` writes them as a folder that does
not require the corpus and can be shared between machines (`minigpt tokenize`):
    prepared.json    version of the format, name, split, kind of tokenizer, and the settings with which the text was read
    tokenizer/       for `from_pretrained`
    train/           a token stream
    validation/      a token stream, if there is a validation split
    manifest.json    size and SHA-256 of each file
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..atomic import MANIFEST, new_folder, read_manifest, seal, sha256
from ..errors import MiniGPTError
from .cache import NAME, cached, verification_error
from .chat_format import END, START, with_chat_tokens, with_reserved_tokens
from .conversations import build_conversation_stream, contents_of
from .corpus import CACHE, Corpus, public_name
from .documents import Documents, Mixture
from .duplicates import DROPPED
from .files import SHARD_CACHE, extension_of, is_url, prepared_folder
from .sharded import ShardStore
from .stream import TokenStream, build_stream
from .tokenizer import (
    appended_tokens,
    byte_level_bpe,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    lost_characters,
    special_tokens_in_text,
    tokenizer_fingerprint,
    with_special_tokens,
)

logger = logging.getLogger(__name__)

# With fewer tokens, the standard error of a validation loss exceeds 0.03 nats per token, if the losses of individual tokens
# have a standard deviation of about 3 nats.
MIN_TOKENS_FOR_A_SCORE = 10_000
TOKEN_LOSS_STANDARD_DEVIATION = 3.0

# BPE is trained on about this many characters, evenly spaced over the text; more text hardly changes the merges.
BPE_CHARACTERS = 100_000_000
# An existing tokenizer is checked on excerpts of all documents: characters in total, and per window.
CHECKED_CHARACTERS, CHECKED_WINDOW = 100_000, 1000
VERSION = 3  # version of the format of a prepared text; 1 had no manifest, 2 no settings
REMEDY = "create it again with `minigpt tokenize`"
# The settings that, together with the text, determine the content of a prepared text. (Which part of the validation split is
# scored also depends on the window length, see `ValidationSample`.)
TEXT_SETTINGS = (
    *("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format", "streaming", "max_tokens"),
    *("validation_fraction", "validation_characters", "tokenizer", "vocab_size", "chat_tokens", "dedup"),
)
# Values of settings that a folder of an earlier version does not have.
BEFORE_INTRODUCTION = {"dedup": "none", "chat_tokens": False}


@dataclass(frozen=True)
class ValidationSample:
    """How much of the validation split is scored. The totals of a streamed dataset are unknown (None).

    Args:
        documents: Number of documents in the sample.
        of_documents: Number of documents in the validation split.
        characters: Number of characters in the sample.
        of_characters: Number of characters in the validation split.
        window: Length of a window in characters; excerpts consist of complete windows (see `Documents.sample`). 0 for
            conversations, which are scored in full.
    """

    documents: int
    of_documents: int | None
    characters: int
    of_characters: int | None
    window: int

    def __str__(self) -> str:
        if not self.window:
            return f"the answers of {self.documents:,} of {self.of_documents:,} conversations"
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
    """A tokenized corpus.

    Args:
        name: Name of the corpus.
        split_description: How the corpus was split.
        kind: The value of `--tokenizer`.
        lossy: What the tokenizer loses of the text; None if decoding restores it.
        tokenizer: The tokenizer.
        train: Tokens to train on.
        validation: Tokens of the validation split, or of the sample of it that is scored.
        scored: The size of that sample.
        duplicates: See `Corpus`.
        shards: Number of merged shards; 0 for other texts. Shards have a validation split of their own, see `load_corpus`.
        unseen_fraction: Share of the text that the models that training starts from have held out as well, if they were
            trained on a part of the validation split; otherwise `None`.
        is_compared: Whether the text was compared with that of the model that training starts from.
    """

    name: str
    split_description: str
    kind: str
    lossy: str | None
    tokenizer: PreTrainedTokenizerBase
    train: TokenStream
    validation: TokenStream | None
    scored: ValidationSample | None
    shards: int = 0
    duplicates: tuple[Path, ...] = ()
    unseen_fraction: float | None = None
    is_compared: bool = False

    @classmethod
    def open(cls, folder: Path, cache_dir: Path = CACHE, shard_cache: float = SHARD_CACHE) -> "PreparedText":
        """Open a folder written by `save` or `merge_shards`, after verifying it against its manifest.

        Args:
            folder: See `prepared_folder`.
            cache_dir: Root of the cache, which records the files that have been verified.
            shard_cache: Maximum size of the copies of remote shards, in GB.

        Raises:
            MiniGPTError: if it is damaged or has another version of the format.
        """
        metadata = _read_metadata(folder)
        store = None
        if "shards" in metadata:
            store = _store_of(folder, cache_dir, shard_cache)
        if store is not None and store.cache is not None:
            pass  # the index was verified when it was copied, and each shard is verified when it is copied
        elif (fault := verification_error(folder, cache_dir)) is not None:
            raise MiniGPTError(f"{folder}: this prepared text is damaged ({fault}): {REMEDY}")
        try:
            scored = metadata["scored"]
            text = cls(
                name=metadata["name"],
                split_description=metadata["cut"],
                kind=metadata["kind"],
                lossy=metadata["lossy"],
                shards=metadata.get("shards", 0),
                scored=None if scored is None else ValidationSample(**scored),
                train=TokenStream.open(folder / "train", store),
                validation=TokenStream.open(folder / "validation", store) if (folder / "validation").is_dir() else None,
                tokenizer=load_tokenizer(str(folder / "tokenizer")),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MiniGPTError(f"{folder}: this prepared text cannot be read ({error}): {REMEDY}") from error
        fingerprint = tokenizer_fingerprint(text.tokenizer)[:16]
        for stream in (text.train, text.validation):
            if stream is not None and fingerprint not in stream.fingerprint.split("-"):
                raise MiniGPTError(f"{folder}: {stream.folder.name}/ was not encoded with tokenizer/: {REMEDY}")
        return text

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write a folder atomically. The files of token streams are hard links to those of the cache if possible.

        Args:
            settings: The `TEXT_SETTINGS` with which the text was prepared; see `prepared_settings`.

        Raises:
            MiniGPTError: if `folder` exists.
            OSError: if it cannot be written; no partial folder remains.
        """
        # Other machines cannot distinguish paths from names of datasets, so the public names are stored.
        metadata = {
            "version": VERSION,
            "name": public_name(self.name),
            "cut": self.split_description,
            "kind": public_name(self.kind),
            "lossy": self.lossy,
            "settings": {name: settings[name] for name in TEXT_SETTINGS} | {"tokenizer": public_name(self.kind)},
            "scored": None if self.scored is None else asdict(self.scored),
        }
        with new_folder(folder) as content:
            self.tokenizer.save_pretrained(content / "tokenizer")
            for name, stream in (("train", self.train), ("validation", self.validation)):
                if stream is not None:
                    ignored = shutil.ignore_patterns(MANIFEST, NAME)
                    shutil.copytree(stream.folder, content / name, ignore=ignored, copy_function=_link_or_copy)
            join_listings(self.duplicates, content)
            (content / "prepared.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
            seal(content)


def join_listings(listings: Sequence[Path], folder: Path) -> int:
    """Write the list of dropped documents into a folder, if duplicates were to be dropped. Returns their number."""
    lines = [line for file in listings for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
    if listings:
        (folder / DROPPED).write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _link_or_copy(source: str, target: str) -> None:
    """Create a hard link, which needs no space, or a copy if the file system has none or is another one."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def find_prepared(data: str, cache_dir: Path | str | None = None) -> Path | None:
    """Return the folder to open if `data` was written by `minigpt tokenize`, or None.

    Args:
        data: A folder, or the URL of one with merged shards, whose index is copied to the cache.
        cache_dir: Root of the cache.
    """
    if is_url(data):
        return _copied_index(data.rstrip("/"), Path(cache_dir) if cache_dir else CACHE)
    return prepared_folder(data)


@cache
def _copied_index(url: str, cache_dir: Path) -> Path | None:
    """Return the copy of the index of merged shards, which is stored under the hash of its manifest; None without index."""
    if extension_of(url):
        return None
    try:
        with fsspec.open(f"{url}/index/{MANIFEST}", "rb") as file:
            manifest = file.read()
    except Exception:  # its type depends on the file system; reading the URL as text reports it
        return None

    def copy(folder: Path) -> None:
        (folder / "index").mkdir()
        (folder / "index" / MANIFEST).write_bytes(manifest)
        for name, entry in read_manifest(folder / "index").items():
            if not name.startswith("../"):
                target = folder / "index" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with fsspec.open(f"{url}/index/{name}", "rb", compression=None) as file:
                    target.write_bytes(file.read())
                if sha256(target) != entry["sha256"]:
                    raise MiniGPTError(f"{url}/index/{name}: differs from the manifest; upload the folder again")
        (folder / "location.json").write_text(json.dumps(url), encoding="utf-8")

    name = hashlib.sha256(url.encode() + b"\0" + manifest).hexdigest()[:32]
    return cached(cache_dir / "indexes" / name, copy, lambda folder: folder / "index", cache_dir, "index of shards")


def _store_of(index: Path, cache_dir: Path, shard_cache: float) -> ShardStore:
    """Return the files that an index of merged shards refers to.

    Raises:
        MiniGPTError: if it refers to files outside its folder.
    """
    files = {name[3:]: entry for name, entry in read_manifest(index).items() if name.startswith("../")}
    for name in files:
        if {"", ".", ".."} & {*name.split("/")} or "\\" in name or ":" in name:
            raise MiniGPTError(f"{index}: refers to {name!r}, which is not in its folder: {REMEDY}")
    if not (location := index.parent / "location.json").is_file():
        return ShardStore(str(index.parent), files)
    return ShardStore(
        json.loads(location.read_text(encoding="utf-8")), files, cache_dir / "shards", int(shard_cache * 1e9)
    )


def prepared_settings(folder: Path) -> dict[str, Any]:
    """Return the `TEXT_SETTINGS` with which a text was prepared. (`PreparedText.open` verifies the file.)

    Raises:
        MiniGPTError: if they cannot be read or have another version of the format.
    """
    try:
        settings = BEFORE_INTRODUCTION | _read_metadata(folder)["settings"]
        return {name: settings[name] for name in TEXT_SETTINGS}
    except (KeyError, TypeError) as error:
        raise MiniGPTError(f"{folder}: this prepared text has no settings ({error}): {REMEDY}") from error


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Return the content of `prepared.json`, without the version."""
    try:
        metadata = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        version = metadata.pop("version", 1)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MiniGPTError(f"{folder}: this prepared text cannot be read ({error}): {REMEDY}") from error
    if version != VERSION:
        raise MiniGPTError(f"{folder}: this prepared text has format {version}, and {VERSION} is required: {REMEDY}")
    return metadata


def prepare(
    corpus: Corpus,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
    *,
    block_size: int | Callable[[TokenStream], int],
    validation_characters: int,
    num_proc: int | None = None,
    max_tokens: int | None = None,
    chat_tokens: bool = False,
) -> PreparedText:
    """Train or load a tokenizer and encode a corpus with it.

    Args:
        corpus: The text.
        tokenizer: `bpe`, `characters`, `bytes`, or a folder or Hub id.
        vocab_size: Maximum vocabulary size of `bpe`.
        cache_dir: Root of the cache, for tokenizers and streams.
        block_size: Length of an evaluation window in tokens, or a function of the training tokens that returns it; a sample
            of the validation split consists of windows.
        validation_characters: Number of characters of the validation split to score, sampled from all its documents.
        num_proc: Number of encoding threads; default: one per core, at most 16.
        max_tokens: Maximum number of training tokens; see `build_stream`.
        chat_tokens: Reserve the tokens of ChatML, which count towards `vocab_size`.

    Raises:
        MiniGPTError: if no text is left to train on, none is held out, or `max_tokens` would change the shares of a mixture.
    """
    reserved = len((START, END)) if chat_tokens else 0
    chosen = make_tokenizer(corpus, tokenizer, vocab_size, cache_dir, reserved=reserved)
    if chat_tokens:
        chosen = with_reserved_tokens(chosen)
    lossy = None if tokenizer in ("bpe", "characters", "bytes") else report_lossy_tokenizer(chosen, corpus.train)
    with tqdm(
        total=corpus.train.characters, desc="tokenizing", unit=" characters", unit_scale=True, delay=2, leave=False
    ) as bar:
        train = build_stream(corpus.train, chosen, cache_dir, num_proc, bar.update, max_tokens)
    if len(train) == len(train.documents):
        held_out = "nothing" if corpus.validation is None else f"{corpus.validation.characters or 0:,} characters"
        limit = "" if max_tokens is None else f", and max_tokens is {max_tokens:,}"
        raise MiniGPTError(
            f"{corpus.name}: no text is left to train on: it has {corpus.train.characters or 0:,} training characters, "
            f"{held_out} held out for validation{limit}; provide more text or a lower --validation_fraction"
        )
    if isinstance(corpus.train, Mixture) and train.characters < (corpus.train.characters or 0):
        raise MiniGPTError(
            f"{corpus.name}: max_tokens {max_tokens:,} would use {train.characters:,} of the {corpus.train.characters:,} "
            "characters of this mixture, those of its first sources, and not its shares: omit max_tokens; a shorter source "
            "shortens the mixture"
        )
    is_stream = corpus.train.characters is None
    # A stream that is cut has fewer tokens than `max_tokens` by up to a character's.
    if isinstance(corpus.train, Mixture) and is_stream and max_tokens and len(train) < 0.99 * max_tokens:
        logger.info(
            "the mixture has %s of %s tokens: it ends with the source that is exhausted first",
            f"{len(train):,}",
            f"{max_tokens:,}",
        )
    validation = scored = None
    if corpus.validation is not None:
        tokens = block_size if isinstance(block_size, int) else block_size(train)
        window = max(1, round(tokens * train.characters / (len(train) - len(train.documents))))
        sampled = corpus.validation.sample(validation_characters, window)
        validation = build_stream(sampled, chosen, cache_dir, num_proc)
        if not len(validation):
            raise MiniGPTError(
                f"{corpus.name}: no text is held out for validation; raise --validation_fraction, or set it to 0"
            )
        scored = ValidationSample(
            sampled.number_of_documents or len(validation.documents),
            corpus.validation.number_of_documents,
            validation.characters,
            corpus.validation.characters,
            window,
        )
        is_complete = validation.characters == corpus.validation.characters
        remedy = _remedy_for_small_sample(corpus, "text") if is_complete else "raise --validation_characters"
        warn_if_sample_is_small(validation.targets, validation.bytes, remedy)
    return PreparedText(
        name=corpus.name,
        split_description=corpus.split_description,
        kind=tokenizer,
        lossy=lossy,
        tokenizer=chosen,
        train=train,
        validation=validation,
        scored=scored,
        duplicates=corpus.duplicates,
    )


def prepare_conversations(
    corpus: Corpus,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
    *,
    block_size: int,
    chat_tokens: bool = False,
) -> PreparedText:
    """Encode conversations with a tokenizer, to which the tokens of ChatML are added.

    Args:
        corpus: Serialized conversations.
        tokenizer: `bpe` or `characters`, trained on the contents of messages; `bytes`; or a folder or Hub id.
        vocab_size: Maximum vocabulary size of `bpe`.
        cache_dir: Root of the cache.
        block_size: Conversations with more input tokens are omitted, which is logged.
        chat_tokens: The tokens of ChatML count towards `vocab_size`.

    Raises:
        MiniGPTError: if no conversation is left to train on, or none is held out.
    """
    reserved = len((START, END)) if chat_tokens else 0
    chosen = with_chat_tokens(make_tokenizer(corpus, tokenizer, vocab_size, cache_dir, contents_of, reserved))

    def encode(documents: Documents, split: str) -> TokenStream:
        total = documents.number_of_documents
        with tqdm(total=total, desc="tokenizing", unit=" conversations", delay=2, leave=False) as bar:
            stream = build_conversation_stream(documents, chosen, block_size, cache_dir, bar.update)
        if omitted := (total or 0) - len(stream.documents):
            logger.warning(
                "%s: %s of %s conversations of the %s split have more than %s tokens (block_size) and are left out",
                *(corpus.name, f"{omitted:,}", f"{total:,}", split, f"{block_size:,}"),
            )
        if not len(stream.documents):
            raise MiniGPTError(
                f"{corpus.name}: no conversation of the {split} split fits into {block_size:,} tokens; raise --block_size"
            )
        return stream

    train = encode(corpus.train, "training")
    validation = scored = None
    if corpus.validation is not None:
        validation = encode(corpus.validation, "validation")
        characters, documents = validation.characters, len(validation.documents)
        scored = ValidationSample(documents, corpus.validation.number_of_documents, characters, characters, window=0)
        remedy = _remedy_for_small_sample(corpus, "conversations")
        warn_if_sample_is_small(validation.targets, validation.bytes, remedy)
    return PreparedText(corpus.name, corpus.split_description, tokenizer, None, chosen, train, validation, scored)


def report_lossy_tokenizer(tokenizer: PreTrainedTokenizerBase, documents: Documents) -> str | None:
    """Check a tokenizer on a sample of the text; log and return a description of what it loses, or None."""
    sample = documents.sample(CHECKED_CHARACTERS, CHECKED_WINDOW)
    if (lost := lost_characters(tokenizer, sample)) is None:
        return None
    sentence = (
        f"the tokenizer does not reproduce the text ({lost}, in a sample of about {CHECKED_CHARACTERS:,} characters): bits "
        "per byte refer to the original bytes and are not comparable with those of a tokenizer that reproduces it"
    )
    logger.warning("%s, such as --tokenizer bpe", sentence)
    return sentence


def _remedy_for_small_sample(corpus: Corpus, what: str) -> str:
    if corpus.is_provided:
        return f"provide a validation split with more {what}"
    return f"provide more {what}, or raise --validation_fraction"


def warn_if_sample_is_small(tokens: int, size: int, remedy: str, score: str = "validation score") -> None:
    """Warn if a score has a large standard error.

    Args:
        tokens: Number of scored tokens.
        size: Number of their UTF-8 bytes.
        remedy: What to do, for the message.
        score: Name of the score, for the message.
    """
    if tokens < MIN_TOKENS_FOR_A_SCORE:
        error = TOKEN_LOSS_STANDARD_DEVIATION / math.sqrt(max(tokens, 1))
        logger.warning(
            "a %s on only %s tokens (%s bytes) has a standard error of about %.2f nats per token; for a more reliable "
            "score, %s",
            score,
            f"{tokens:,}",
            f"{size:,}",
            error,
            remedy,
        )


def make_tokenizer(
    corpus: Corpus,
    tokenizer: str,
    vocab_size: int,
    cache_dir: Path,
    texts_of: Callable[[Documents], Iterator[str]] | None = None,
    reserved: int = 0,
) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the training split, or load an existing one.

    Args:
        texts_of: Returns the texts in documents that are not plain text. Default: for plain text.
        reserved: Part of `vocab_size` that is left for special tokens to be added.
    """
    if tokenizer == "bytes":
        return byte_tokenizer()
    if tokenizer == "bpe":
        sample = texts_of or (lambda documents: documents.evenly_spaced(BPE_CHARACTERS))
        train = lambda: byte_level_bpe(sample(corpus.train), vocab_size, reserved)  # noqa: E731
        return _cached_tokenizer(cache_dir, train, f"bpe {vocab_size - reserved}", corpus.train)
    if tokenizer == "characters":
        # Characters of the validation split are included: without ids they could not be scored, and the existence of a
        # character reveals next to nothing about the validation text.
        splits = [split for split in (corpus.train, corpus.validation) if split is not None]
        read = texts_of or (lambda documents: (text for _, text in documents.parts()))
        train = lambda: character_tokenizer(text for split in splits for text in read(split))  # noqa: E731
        return _cached_tokenizer(cache_dir, train, "characters", *splits)
    existing = load_tokenizer(tokenizer)
    if appended := appended_tokens(existing):
        logger.warning(
            "tokenizer %s: appends %s to every text, so programs other than this package end a prompt before the model "
            "continues it; remove this from the post_processor in tokenizer.json",
            *(tokenizer, " ".join(appended)),
        )
    if recognized := special_tokens_in_text(existing):
        logger.warning(
            "tokenizer %s: the string %s in a text is encoded as the special token, because it is in the vocabulary of the "
            "model of this tokenizer, and may end a document; remove such strings from the text",
            *(tokenizer, " or ".join(recognized)),
        )
    return existing


def _cached_tokenizer(
    cache_dir: Path, train: Callable[[], PreTrainedTokenizerBase], kind: str, *splits: Documents
) -> PreTrainedTokenizerBase:
    """Return the tokenizer trained on the same text earlier, or train it."""
    name = hashlib.sha256(" ".join([kind, *(split.fingerprint for split in splits)]).encode()).hexdigest()[:32]
    return cached(
        cache_dir / "tokenizers" / name,
        lambda folder: train().backend_tokenizer.save(str(folder / "tokenizer.json")),
        lambda folder: with_special_tokens(Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())),
        cache_dir,
        "tokenizer",
    )
