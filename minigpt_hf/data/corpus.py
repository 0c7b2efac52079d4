"""Load the text that `--data` names and split it into training and validation documents, without duplicates across splits."""

import codecs
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit, urlunsplit

import datasets
import numpy as np

from ..errors import MiniGPTError
from .arrays import blocks, lowest_distinct, stored
from .documents import Documents, IndexedDocuments, Mixture, StreamedDocuments
from .duplicates import KINDS, without_duplicates
from .files import FORMATS, Share, exists, is_url
from .reading import NEWLINES, Decoding, printable
from .sources import Source, SourceContent, has_split, names_hub_dataset

logger = logging.getLogger(__name__)

CACHE = Path(datasets.config.HF_CACHE_HOME) / "minigpt"
# With fewer documents, a split by document is too coarse, and the tail of the text is used for validation.
MIN_DOCUMENTS_FOR_HASH_SPLIT = 20


@dataclass(frozen=True)
class Corpus:
    """A text, divided into a training and a validation split.

    Args:
        name: The value of `--data`.
        train: Documents to train on.
        validation: Held-out documents, if any.
        split_description: How the text was split; stored in the model folder.
        unused: A validation split provided with the data that is not used, because `validation_fraction` is 0.
        inputs: See `SourceContent`.
        duplicates: List of the dropped documents, for each source; see `duplicates`.
        is_provided: Whether the validation split was provided with the data, so that `validation_fraction` has no effect.
    """

    name: str
    train: Documents
    validation: Documents | None
    split_description: str
    unused: Documents | None = None
    inputs: str = ""
    duplicates: tuple[Path, ...] = ()
    is_provided: bool = False


def load_corpus(
    data: str,
    validation_fraction: float = 0.1,
    encoding: str = "utf-8",
    *,
    encoding_errors: str = "strict",
    newline: str = "preserve",
    split: str | None = None,
    text_column: str | None = None,
    data_format: str | None = None,
    streaming: bool = False,
    chat: bool = False,
    system: str | None = None,
    share: Share | None = None,
    dedup: str = "none",
    cache_dir: Path = CACHE,
) -> Corpus:
    """Read text as documents and split it into training and validation.

    Args:
        data: A file, folder, glob or URL of text or tables; a folder written by `save_to_disk`; a Hub dataset (`user/name`,
            `user/name:config`); `stdlib`; `-` for standard input; or a mixture, `one:0.7,other:0.3`.
        validation_fraction: Share held out for validation if the data has no validation split; 0 for no validation. Of at
            least 20 documents, those whose content has the lowest SHA-256 are held out, so that the split of a document does
            not depend on the order of files; of fewer documents, the tail of the text, in characters.
        encoding: Encoding of text files and of JSON, CSV and TSV tables.
        encoding_errors: Handling of bytes that cannot be decoded: `strict` raises an error, `replace` substitutes U+FFFD,
            `ignore` drops them.
        newline: Line ends of text files: `preserve` keeps every byte, `universal` converts CRLF and CR to LF.
        split: A split as in `datasets` (`train[:5%]`). Default: `train`, and the validation split of the data, if any.
        text_column: The column of a table that contains the text. Default: `text`, or the only column of text.
        data_format: Format of the files, one of `files.FORMATS`. Default: that of their extensions.
        streaming: Read the documents of a Hub dataset on demand without storing them.
        chat: Read conversations from the rows of tables; see `conversations`.
        system: With `chat`, content of a system message for conversations that have none.
        share: Read only a share of the files or rows. The validation split then consists of the documents whose hash, scaled
            to [0, 1), is below `validation_fraction`, so that it does not depend on the other shares.
        dedup: Duplicates to drop from each source, or from the share: `none`, `exact` or `near`; see `duplicates`. A
            validation split provided with the data is not changed.
        cache_dir: Root of the cache.

    Raises:
        MiniGPTError: if the data does not exist, has no text, or cannot be decoded.
    """
    if not 0 <= validation_fraction < 1:
        raise MiniGPTError(f"validation_fraction is {validation_fraction}: it must be in [0, 1), e.g. 0.1")
    if data_format is not None and data_format not in FORMATS:
        raise MiniGPTError(f"data_format is {data_format!r}: it must be one of {', '.join(FORMATS)}")
    if encoding_errors not in ("strict", "replace", "ignore"):
        raise MiniGPTError(f"encoding_errors is {encoding_errors!r}: it must be one of strict, replace, ignore")
    if dedup not in KINDS:
        raise MiniGPTError(f"dedup is {dedup!r}: it must be one of {', '.join(KINDS)}")
    if newline not in NEWLINES:
        raise MiniGPTError(f"newline is {newline!r}: it must be one of {', '.join(NEWLINES)}")
    try:
        codecs.lookup(encoding)
        b"a".decode(encoding, "replace")  # fails for codecs that do not decode bytes to text, such as rot13 and base64
    except (LookupError, ValueError) as error:
        what = "is unknown" if "unknown encoding" in str(error) else "does not decode bytes to text"
        raise MiniGPTError(f"encoding {encoding!r} {what}; try utf-8, latin-1, cp1252 or utf-16") from error

    decoding = Decoding(encoding, encoding_errors, newline)

    listings: list[Path] = []

    def read(name: str, split: str | None) -> SourceContent:
        content = Source(
            name, decoding, split, text_column, data_format, streaming, cache_dir, chat, system, share
        ).read()
        if dedup == "none":
            return content
        unique = without_duplicates(name, content.train, dedup, cache_dir)
        listings.append(unique.listing)
        note = "; ".join(filter(None, (content.note, unique.note)))
        return replace(content, train=unique.documents, note=note)

    if system is not None and not chat:
        raise MiniGPTError("--system requires --chat")
    if (shares := mixture(data)) is None:
        content = read(data, split)
        if chat:
            _check_conversations(data, content, validation_fraction)
        if share is not None:
            return replace(_split_share(data, content, validation_fraction), duplicates=tuple(listings))
        return replace(_split([(data, content)], validation_fraction)[0], duplicates=tuple(listings))
    if share is not None:
        raise MiniGPTError(f"{data}: is a mixture, which has no shards; tokenize each source by itself")
    if dedup != "none":
        logger.warning("dedup %s: finds duplicates within each source of a mixture, not across its sources", dedup)
    if chat:
        raise MiniGPTError(f"{data}: is a mixture, which --chat does not support; give a folder or pattern of files")
    contents = []
    for name in shares:
        applies = split is None or has_split(name, split)
        if not applies:
            logger.warning("--data_split %s has no effect on %s, which is not a dataset with splits", split, name)
        contents.append((name, read(name, split if applies else None)))
    mixed = _mix(data, _split(contents, validation_fraction), list(shares.values()))
    return replace(mixed, duplicates=tuple(listings))


def _check_conversations(name: str, content: SourceContent, fraction: float) -> None:
    """Check that conversations can be held out: with few documents, a split would divide one."""
    if fraction == 0 or content.validation is not None or _is_split_by_hash(content.train):
        return
    raise MiniGPTError(
        f"{name}: to hold out conversations for validation, at least {MIN_DOCUMENTS_FOR_HASH_SPLIT} are required; give "
        "more, or use --validation_fraction 0"
    )


def _mix(data: str, corpora: list[Corpus], weights: list[float]) -> Corpus:
    """Combine corpora that share no document between training and validation, in the given shares of characters."""

    def mix_existing(splits: list[Documents | None], kind: str) -> Mixture | None:
        """Mix the splits that exist, with their shares normalized, and log which part of each is used."""
        present = [(split, *other) for split, *other in zip(splits, weights, corpora, strict=True) if split is not None]
        if not present:
            return None
        documents, shares, sources = zip(*present, strict=True)
        mixed = Mixture.of(documents, [share / sum(shares) for share in shares])
        for corpus, split, component in zip(sources, documents, mixed.components, strict=True):
            used, total = component.characters, split.characters
            if used is not None and total is not None and used < total:
                logger.info(
                    "the mixture uses %s of %s %scharacters of %s: it ends with the source that is exhausted first",
                    f"{used:,}",
                    f"{total:,}",
                    kind,
                    corpus.name,
                )
        return mixed

    train = mix_existing([corpus.train for corpus in corpora], "")
    assert train is not None  # every corpus has a training split

    return Corpus(
        data,
        train,
        mix_existing([corpus.validation for corpus in corpora], "validation "),
        "; ".join(f"of {public_name(corpus.name)}: {corpus.split_description}" for corpus in corpora),
        mix_existing([corpus.unused for corpus in corpora], "unused "),
        is_provided=all(corpus.is_provided for corpus in corpora),
    )


def mixture(data: str) -> dict[str, float] | None:
    """Parse a mixture: `one:0.7,other:0.3` -> {"one": 0.7, "other": 0.3}; None if `data` is not a mixture.

    Shares are normalized to a sum of 1. Names may contain commas and colons if a file or folder of that name exists.
    """
    if "," not in data or exists(data):
        return None
    shares: dict[str, float] = {}
    rest = data
    while rest:
        # The shortest name that exists, or else the shortest without a comma.
        candidates = [
            match
            for end in re.finditer(r",|$", rest)
            if (match := re.fullmatch(r"\s*(.+):([0-9.eE+-]+)\s*", rest[: end.start()]))
        ]
        existing = next((match for match in candidates if "," in match[1] and exists(match[1])), None)
        match = existing or next((match for match in candidates if "," not in match[1] or is_url(match[1])), None)
        component = match[0] if match else rest.partition(",")[0]
        try:
            share = float(match[2]) if match else None
        except ValueError:  # e.g. "1e"
            share = None
        if match is None or share is None:
            raise MiniGPTError(
                f"{data}: {component.strip()!r} is not a valid component of a mixture; write each as name:share, e.g. "
                "plays.txt:0.7,notes:0.3"
            )
        if match[1] in shares:
            raise MiniGPTError(f"{data}: {match[1]} occurs twice in this mixture; specify its total share once")
        shares[match[1]] = share
        rest = rest[len(component) + 1 :]
    if not min(shares.values(), default=0) > 0 or not np.isfinite(sum(shares.values())):
        raise MiniGPTError(f"{data}: each share of a mixture must be positive and finite")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def hub_datasets(data: str) -> list[str]:
    """Return the Hub ids in the value of `--data`: "user/plays:0.7,notes.txt:0.3" -> ["user/plays"]."""
    is_mixture = "," in data and not exists(data)
    names = [part.strip().rpartition(":")[0] for part in data.split(",")] if is_mixture else [data]
    return [name.partition(":")[0] for name in names if names_hub_dataset(name)]


def public_name(data: str | None) -> str | None:
    """Return a name for publication: local paths without their parent folders, and web addresses without user, password and
    query, which may contain an access token; other names unchanged."""
    if data is None:
        return None
    if (shares := mixture(data)) is not None:
        return ",".join(f"{public_name(name)}:{share:g}" for name, share in shares.items())
    if data.startswith(("http://", "https://")):
        parts = urlsplit(data)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return printable(Path(data).absolute().name) if exists(data) else data


def _split(contents: list[tuple[str, SourceContent]], fraction: float) -> list[Corpus]:
    """Split each source with a common hash threshold, so that no document is in both splits."""
    for name, content in contents:
        for documents in (content.train, content.validation):
            if documents is not None and documents.characters == 0:
                raise MiniGPTError(f"{name}: contains no text; specify a file or folder with text")
    if fraction == 0:
        corpora = [
            Corpus(name, content.train, None, _without_validation(content), content.validation)
            for name, content in contents
        ]
    else:
        is_held_out = _hash_threshold([content for _, content in contents], fraction)
        corpora = [_split_one(name, content, fraction, is_held_out) for name, content in contents]
        corpora = _without_copies(corpora, [content.validation is not None for _, content in contents])
        for corpus, (_, content) in zip(corpora, contents, strict=True):
            if content.validation is None:
                _warn_if_shares_differ(corpus, content.train.characters, fraction)
    return [
        replace(corpus, split_description=f"{corpus.split_description}; {content.note}") if content.note else corpus
        for corpus, (_, content) in zip(corpora, contents, strict=True)
    ]


def _without_validation(content: SourceContent) -> str:
    """Describe the split of a text of which nothing is held out."""
    return "no validation" + "; the validation split provided with the data is not used" * (
        content.validation is not None
    )


def _split_share(name: str, content: SourceContent, fraction: float) -> Corpus:
    """Split a share of a source by a hash threshold that is the same for all shares."""
    if fraction == 0 or content.validation is not None:
        description = "the validation split provided with the data" if fraction else _without_validation(content)
        return Corpus(name, content.train, content.validation if fraction else None, description, inputs=content.inputs)
    description = f"documents with the lowest hash of their content, a share of {fraction:g}"
    train, validation = content.train, content.train
    if isinstance(content.train, StreamedDocuments):
        train, validation = replace(content.train, low=fraction), replace(content.train, high=fraction)
    else:
        mask = content.train.keys < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
        train, validation = content.train.select(~mask), content.train.select(mask)
    return Corpus(name, train, validation, description, inputs=content.inputs)


def _warn_if_shares_differ(corpus: Corpus, total: int | None, fraction: float) -> None:
    """Warn if copies or long documents make the splits very different in size from `validation_fraction`."""
    trained_on = corpus.train.characters
    held_out = corpus.validation.characters if corpus.validation is not None else 0
    if total is None or trained_on is None or held_out is None:  # a stream
        return
    is_near = fraction / 2 <= held_out / total <= 2 * fraction
    is_little = trained_on / total < 0.5 < 1 - fraction
    if is_near and not is_little:
        return
    training = f"; only {trained_on:,} of {total:,} characters remain for training" if is_little else ""
    logger.warning(
        "%s: %.3g%% of its characters are held out, while --validation_fraction requests %.3g%%, because documents are not "
        "divided and copies are excluded%s",
        corpus.name,
        100 * held_out / total,
        100 * fraction,
        training,
    )


def _hash_threshold(contents: list[SourceContent], fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a predicate on hash keys that selects held-out documents. Streams are split by hash directly."""
    sources = [one.train for one in contents if one.validation is None and _is_split_by_hash(one.train)]
    keys = (block for source in sources for block in blocks(source.keys))
    folder = next((source.folder for source in sources), None)
    last = lowest_distinct(stored(keys, sum(map(len, sources)), np.dtype(np.uint64), folder), fraction)
    return lambda keys: keys <= (last or 0)


def _is_split_by_hash(documents: Documents) -> TypeGuard[IndexedDocuments]:
    return isinstance(documents, IndexedDocuments) and len(documents) >= MIN_DOCUMENTS_FOR_HASH_SPLIT


def _split_one(
    name: str, content: SourceContent, fraction: float, is_held_out: Callable[[np.ndarray], np.ndarray]
) -> Corpus:
    documents = content.train
    if content.validation is not None:
        description = "the validation split provided with the data"
        return Corpus(name, documents, content.validation, description, is_provided=True)
    if isinstance(documents, StreamedDocuments):
        description = f"documents with the lowest hash of their content, a share of {fraction:g}"
        return Corpus(name, replace(documents, low=fraction), replace(documents, high=fraction), description)
    if _is_split_by_hash(documents):
        # Copies of a document have the same hash and are therefore in the same split.
        keys = documents.keys
        mask = is_held_out(keys)
        if not mask.any():
            return Corpus(name, documents, None, f"none of {len(documents)} documents")
        if not mask.all():
            # Ordered by hash as well, so that the head of the validation split is a random sample of it.
            held_out = np.flatnonzero(mask)
            held_out = held_out[np.argsort(keys[held_out], kind="stable")]
            description = f"{len(held_out)} of {len(documents)} documents, those with the lowest hash of their content"
            return Corpus(name, documents.select(~mask), documents.select(held_out), description)
    total = documents.characters
    boundary = int(total * (1 - fraction))
    train, validation = documents.split(boundary)
    return Corpus(name, train, validation, f"the last {total - boundary:,} of {total:,} characters")


def _indexed(splits: Iterable[Documents | None]) -> dict[int, IndexedDocuments]:
    """Return the splits of known content, by the number of their source."""
    return {number: one for number, one in enumerate(splits) if isinstance(one, IndexedDocuments)}


def _distinct_keys(splits: Iterable[IndexedDocuments]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(documents.keys for documents in splits)]))


def _positions_in(documents: IndexedDocuments, keys: np.ndarray) -> np.ndarray:
    """Return the positions of the documents whose keys are among sorted keys."""
    found, start = [np.arange(0)], 0
    for block in blocks(documents.keys) if len(keys) else ():
        nearest = np.minimum(np.searchsorted(keys, block), len(keys) - 1)
        found.append(start + np.flatnonzero(keys[nearest] == block))
        start += len(block)
    return np.concatenate(found)


def _without_copies(corpora: list[Corpus], has_own_validation: list[bool]) -> list[Corpus]:
    """Remove copies of validation documents, of the same or another source, from training.

    A document that is divided between both splits keeps its first part in training. A dataset with its own validation split
    is left as published.
    """
    validations = _indexed(corpus.validation for corpus in corpora)
    held_out_keys = _distinct_keys(validations.values())
    candidates = {
        number: (documents, _positions_in(documents, held_out_keys))
        for number, documents in _indexed(corpus.train for corpus in corpora).items()
    }
    shared = _distinct_keys(documents.select(positions) for documents, positions in candidates.values())
    held_out: dict[bytes, list[tuple[int, int, int]]] = {}  # SHA-256 -> (source, begin, end), if a copy may exist
    for number, documents in validations.items():
        for entry in documents.select(_positions_in(documents, shared)).index:
            owned = (number, int(entry["begin"]), int(entry["end"]))
            held_out.setdefault(entry["digest"].tobytes(), []).append(owned)
    cleaned = []
    for number, corpus in enumerate(corpora):
        if not isinstance(corpus.train, IndexedDocuments):
            # All streams use the same threshold; the content of a streamed validation split is not known in advance.
            if has_own_validation[number] and len(corpora) > 1:
                logger.warning("%s: a streamed validation split is not compared with the other sources", corpus.name)
            cleaned.append(corpus)
            continue
        is_copy = np.zeros(len(corpus.train), dtype=bool)
        published_copies = 0
        for position in candidates[number][1]:
            entry = corpus.train.index[position]
            owners = {
                owner
                for owner, begin, end in held_out.get(entry["digest"].tobytes(), ())
                if entry["begin"] < end and begin < entry["end"]
            }
            if has_own_validation[number] and number in owners:
                owners.remove(number)
                published_copies += not owners
            is_copy[position] = bool(owners)
        if published_copies:
            logger.warning(
                "%s: %s documents of its training split also occur in its validation split and remain in both",
                corpus.name,
                f"{published_copies:,}",
            )
        if is_copy.any():
            train, copies = corpus.train.select(~is_copy), int(is_copy.sum())
            if not train.characters:
                raise MiniGPTError(
                    f"{corpus.name}: all of its documents are copies of validation documents, so none is left for training; "
                    "provide other text or use --validation_fraction 0"
                )
            what = "copy" if copies == 1 else "copies"
            description = (
                f"{corpus.split_description}; {copies:,} {what} of validation documents excluded from training"
            )
            logger.info("%s: %s", corpus.name, description)
            corpus = replace(corpus, train=train, split_description=description)
        cleaned.append(corpus)
    return cleaned
