"""Text -> a corpus: a part to learn from, and a part to be examined on that shares no document with it.

In: what `--data` says; `sources` reads it. Out: a `Corpus`. It refuses an empty text and shares that make no sense.
"""

import codecs
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from ..errors import MiniGPTError
from .documents import Documents, Mixture, StreamedDocuments, Texts
from .files import FORMATS, exists, is_url
from .reading import NEWLINES, Decoding, shown
from .sources import Reading, Source, has_split

logger = logging.getLogger(__name__)

CACHE = Path(datasets.config.HF_CACHE_HOME) / "minigpt"
# Below this many documents a tenth of them is too coarse a cut, and the tail of the text serves as validation.
FEWEST_DOCUMENTS_TO_CHOOSE_FROM = 20


@dataclass(frozen=True)
class Corpus:
    """A text cut in two: one part to learn from, one to be examined on, or none.

    `cut` says how, in words that go into the model folder. `unused` is a validation split that comes with the text, if
    nothing is to be held out.
    """

    name: str
    train: Texts
    validation: Texts | None
    cut: str
    unused: Texts | None = None


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
    cache_dir: Path = CACHE,
) -> Corpus:
    """Read text as documents and cut it into train and validation.

    Args:
        data: A file, folder, glob or URL of text or tables; a folder that `save_to_disk` wrote; a Hub dataset
            (`user/name`, `user/name:config`); `stdlib`; `-`, standard input; or a mixture, `one:0.7,other:0.3`.
        validation_fraction: Share of the documents kept for validation, if no validation split comes with the data. Of 20
            documents or more, those whose content has the lowest hashes, so that a document stays on its side whatever
            the order of files; of fewer, the tail of the text, in characters. 0 for no validation.
        encoding: Of text files and tables that are text.
        encoding_errors: What to do with bytes that are no text in that encoding: `strict` refuses the file that has them,
            `replace` puts U+FFFD in their place, `ignore` drops them.
        newline: Line ends of text files: `preserve` keeps every byte, `universal` converts CRLF and CR to LF.
        split: Which split, as `datasets` writes it (`train[:5%]`); default: `train`, and the validation split beside it.
        text_column: The column of a table that is text; default: `text`, or the only one.
        data_format: Reads files as `text`, `json`, `csv`, `parquet` or `arrow`, whatever their endings.
        streaming: Take documents of a Hub dataset as they arrive, and keep none.
        cache_dir: Folder that remembers what a large text holds.

    Raises:
        MiniGPTError: if there is nothing there, no text in it, or it is not text in that encoding.
    """
    if not 0 <= validation_fraction < 1:
        raise MiniGPTError(f"validation_fraction is {validation_fraction}: a share in [0, 1) is held out, e.g. 0.1")
    if data_format is not None and data_format not in FORMATS:
        raise MiniGPTError(f"data_format {data_format!r}: there are {', '.join(FORMATS)}")
    if encoding_errors not in ("strict", "replace", "ignore"):
        raise MiniGPTError(f"encoding_errors {encoding_errors!r}: there are strict, replace, ignore")
    if newline not in NEWLINES:
        raise MiniGPTError(f"newline {newline!r}: there are {', '.join(NEWLINES)}")
    try:
        codecs.lookup(encoding)
        b"a".decode(encoding, "replace")  # refuses codecs that do not decode bytes to text, such as rot13 and base64
    except (LookupError, ValueError) as error:
        what = "is unknown" if "unknown encoding" in str(error) else "does not decode bytes to text"
        raise MiniGPTError(f"encoding {encoding!r} {what}; try utf-8, latin-1, cp1252 or utf-16") from error

    decoding = Decoding(encoding, encoding_errors, newline)

    def read(name: str, split: str | None) -> Reading:
        return Source(name, decoding, split, text_column, data_format, streaming, cache_dir).read()

    if (shares := mixture(data)) is None:
        return _cut([(data, read(data, split))], validation_fraction)[0]
    readings = []
    for name in shares:
        applies = split is None or has_split(name, split)
        if not applies:
            logger.warning("--data_split %s has no effect on %s, which is not a dataset with splits", split, name)
        readings.append((name, read(name, split if applies else None)))
    return _mixed(data, _cut(readings, validation_fraction), list(shares.values()))


def _mixed(data: str, corpora: list[Corpus], weights: list[float]) -> Corpus:
    """Corpora that share no document between train and validation, in these shares of characters."""
    train = Mixture.of([corpus.train for corpus in corpora], weights)
    for corpus, part in zip(corpora, train.texts, strict=True):
        if part.characters is not None and part.characters < corpus.train.characters:
            logger.info(
                "of %s the mixture takes %s of %s characters: it ends with the part that runs out first",
                corpus.name,
                f"{part.characters:,}",
                f"{corpus.train.characters:,}",
            )

    def mixed(texts: list[Texts | None]) -> Mixture | None:
        """Those that there are, in their shares."""
        if not (there := [(text, weight) for text, weight in zip(texts, weights, strict=True) if text is not None]):
            return None
        texts, shares = zip(*there, strict=True)
        return Mixture.of(texts, [share / sum(shares) for share in shares])

    return Corpus(
        data,
        train,
        mixed([corpus.validation for corpus in corpora]),
        "; ".join(f"of {public(corpus.name)}: {corpus.cut}" for corpus in corpora),
        mixed([corpus.unused for corpus in corpora]),
    )


def mixture(data: str) -> dict[str, float] | None:
    """`one:0.7,other:0.3` -> {"one": 0.7, "other": 0.3}; None for what is no mixture. Shares are made to add up to 1.

    A name may have commas and colons in it if something of that name exists.
    """
    if "," not in data or exists(data):
        return None
    shares, rest = {}, data
    while rest:
        # The shortest name that exists, or else the shortest that has no comma.
        found = [
            match
            for end in re.finditer(r",|$", rest)
            if (match := re.fullmatch(r"\s*(.+):([0-9.eE+-]+)\s*", rest[: end.start()]))
        ]
        named = next((match for match in found if "," in match[1] and exists(match[1])), None)
        one = named or next((match for match in found if "," not in match[1] or is_url(match[1])), None)
        part = one[0] if one else rest.partition(",")[0]
        try:
            share = float(one[2])
        except (TypeError, ValueError):
            raise MiniGPTError(
                f"{data}: {part.strip()!r} is no part of a mixture; write each as name:share, e.g. plays.txt:0.7,notes:0.3"
            ) from None
        if one[1] in shares:
            raise MiniGPTError(f"{data}: {one[1]} is named twice in this mixture; give its whole share once")
        shares[one[1]] = share
        rest = rest[len(part) + 1 :]
    if not min(shares.values(), default=0) > 0 or not np.isfinite(sum(shares.values())):
        raise MiniGPTError(f"{data}: each share of a mixture must be more than 0")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def public(data: str | None) -> str | None:
    """What may be published of where a text lies: a file without the folders above it, all of a URL or a name."""
    if data is None:
        return None
    if (shares := mixture(data)) is not None:
        return ",".join(f"{public(name)}:{share:g}" for name, share in shares.items())
    return shown(Path(data).absolute().name) if exists(data) else data


def _cut(readings: list[tuple[str, Reading]], fraction: float) -> list[Corpus]:
    """Hold out a share of each text, by one threshold for all, so that no document is on both sides."""
    for name, reading in readings:
        for part in (reading.train, reading.validation):
            if part is not None and part.characters == 0:
                raise MiniGPTError(f"{name}: there is no text in it; give a file or a folder with some")
    if fraction == 0:
        corpora = [Corpus(name, reading.train, None, "no validation", reading.validation) for name, reading in readings]
    else:
        is_held_out = _threshold([reading for _, reading in readings], fraction)
        corpora = [_cut_one(name, reading, fraction, is_held_out) for name, reading in readings]
        corpora = _without_copies(corpora, [reading.validation is not None for _, reading in readings])
        for corpus, (_, reading) in zip(corpora, readings, strict=True):
            if reading.validation is None:
                _warn_about_shares(corpus, reading.train.characters, fraction)
    return [
        replace(corpus, cut=f"{corpus.cut}; {reading.note}") if reading.note else corpus
        for corpus, (_, reading) in zip(corpora, readings, strict=True)
    ]


def _warn_about_shares(corpus: Corpus, total: int | None, fraction: float) -> None:
    """Say so if copies or long documents make the shares very different from those asked for."""
    if total is None:  # a stream
        return
    held_out = (corpus.validation.characters if corpus.validation is not None else 0) / total
    kept = corpus.train.characters / total
    asked_for = fraction / 2 <= held_out <= 2 * fraction
    is_little = kept < 0.5 < 1 - fraction
    if asked_for and not is_little:
        return
    training = "" if not is_little else f"; training keeps only {corpus.train.characters:,} of {total:,} characters"
    logger.warning(
        "%s: %.3g%% of its characters are held out where --validation_fraction asks for %.3g%%, because documents are kept "
        "whole and copies are left out%s",
        corpus.name,
        100 * held_out,
        100 * fraction,
        training,
    )


def _threshold(readings: list[Reading], fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    """Which documents are held out, by their keys: the same of every text. Streams have a threshold of their own."""
    texts = [reading.train for reading in readings if reading.validation is None and _is_cut_by_hash(reading.train)]
    ranked = np.unique(np.concatenate([np.empty(0, np.uint64), *(text.keys for text in texts)]))
    last = ranked[max(1, round(len(ranked) * fraction)) - 1] if len(ranked) else 0
    return lambda keys: keys <= last


def _is_cut_by_hash(text: Texts) -> bool:
    return isinstance(text, Documents) and len(text) >= FEWEST_DOCUMENTS_TO_CHOOSE_FROM


def _cut_one(name: str, reading: Reading, fraction: float, is_held_out: Callable[[np.ndarray], np.ndarray]) -> Corpus:
    whole = reading.train
    if reading.validation is not None:
        return Corpus(name, whole, reading.validation, "the validation split that comes with it")
    if isinstance(whole, StreamedDocuments):
        cut = f"documents with the lowest hash of their content, a share of {fraction:g}"
        return Corpus(name, replace(whole, low=fraction), replace(whole, high=fraction), cut)
    if _is_cut_by_hash(whole):
        # Copies of a document have one hash, so they are on one side together.
        keys = whole.keys
        mask = is_held_out(keys)
        if not mask.any():
            return Corpus(name, whole, None, f"none of {len(whole)} documents")
        if not mask.all():
            # By hash, too: the head of this part is a fair sample of it.
            held_out = np.flatnonzero(mask)
            held_out = held_out[np.argsort(keys[held_out], kind="stable")]
            cut = f"{len(held_out)} of {len(whole)} documents, those with the lowest hash of their content"
            return Corpus(name, whole.select(~mask), whole.select(held_out), cut)
    total = whole.characters
    cut_at = int(total * (1 - fraction))
    train, validation = whole.cut(cut_at)
    return Corpus(name, train, validation, f"the last {total - cut_at:,} of {total:,} characters")


def _without_copies(corpora: list[Corpus], is_published: list[bool]) -> list[Corpus]:
    """Leave out of training what is held out, of this text or another, as a copy.

    A document that is itself cut in two keeps its head in training, and a dataset that comes with a validation split is
    left as it was published.
    """
    held_out: dict[bytes, list[tuple[int, int, int]]] = {}  # hash -> (text, begin, end)
    for number, corpus in enumerate(corpora):
        if isinstance(corpus.validation, Documents):
            for digest, one in zip(corpus.validation.digests, corpus.validation.index, strict=True):
                held_out.setdefault(digest, []).append((number, int(one["begin"]), int(one["end"])))
    keys = np.fromiter((int.from_bytes(digest[:8], "big") for digest in held_out), np.uint64, len(held_out))
    cleaned = []
    for number, corpus in enumerate(corpora):
        if isinstance(corpus.train, StreamedDocuments):
            # Streams are cut by the same share of hashes; what comes with a split of its own is not known beforehand.
            if is_published[number] and len(corpora) > 1:
                logger.warning("%s: a streamed validation split is not compared with the other texts", corpus.name)
            cleaned.append(corpus)
            continue
        is_copy = np.zeros(len(corpus.train), dtype=bool)
        copies_as_published = 0
        for place in np.flatnonzero(np.isin(corpus.train.keys, keys)):
            one = corpus.train.index[place]
            owners = {
                owner
                for owner, begin, end in held_out.get(one["digest"].tobytes(), ())
                if one["begin"] < end and begin < one["end"]
            }
            if is_published[number] and number in owners:
                owners.remove(number)
                copies_as_published += not owners
            is_copy[place] = bool(owners)
        if copies_as_published:
            logger.warning(
                "%s: %s documents of its training split are in its own validation split, too, and stay in both",
                corpus.name,
                f"{copies_as_published:,}",
            )
        if is_copy.any():
            train, copies = corpus.train.select(~is_copy), int(is_copy.sum())
            if not train.characters:
                raise MiniGPTError(
                    f"{corpus.name}: all of its documents are held out for validation, as copies; give other text, or "
                    "hold out none: --validation_fraction 0"
                )
            what = "copy" if copies == 1 else "copies"
            cut = f"{corpus.cut}; {copies:,} {what} of validation documents left out of training"
            logger.info("%s: %s", corpus.name, cut)
            corpus = replace(corpus, train=train, cut=cut)
        cleaned.append(corpus)
    return cleaned
