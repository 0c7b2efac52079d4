"""Text -> a corpus: a part to learn from, and a part to be examined on that shares no document with it.

In: what `--data` says; `sources` reads it. Out: a `Corpus`. It refuses an empty text and shares that make no sense.
"""

import codecs
import re
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from .files import FORMATS
from .sources import Source
from .texts import Documents, Mixture, StreamedDocuments, Texts

CACHE = Path(datasets.config.HF_CACHE_HOME) / "minigpt"
# Below this many documents a tenth of them is too coarse a cut, and the tail of the text serves as validation.
FEWEST_DOCUMENTS_TO_CHOOSE_FROM = 20


@dataclass(frozen=True)
class Corpus:
    """A text cut in two: one part to learn from, one to be examined on, or none.

    `cut` says how, in words that go into the model folder.
    """

    name: str
    train: Texts
    validation: Texts | None
    cut: str


def load_corpus(
    data: str,
    validation_fraction: float = 0.1,
    encoding: str = "utf-8",
    *,
    encoding_errors: str = "strict",
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
        split: Which split, as `datasets` writes it (`train[:5%]`); default: `train`, and the validation split beside it.
        text_column: The column of a table that is text; default: `text`, or the only one.
        data_format: Reads files as `text`, `json`, `csv`, `parquet` or `arrow`, whatever their endings.
        streaming: Take documents of a Hub dataset as they arrive, and keep none.
        cache_dir: Folder that remembers what a large text holds.

    Raises:
        ValueError: if there is nothing there, no text in it, or it is not text in that encoding.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}: a share in [0, 1) is held out, e.g. 0.1")
    if data_format is not None and data_format not in FORMATS:
        raise ValueError(f"data_format {data_format!r}: there are {', '.join(FORMATS)}")
    if encoding_errors not in ("strict", "replace", "ignore"):
        raise ValueError(f"encoding_errors {encoding_errors!r}: there are strict, replace, ignore")
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is unknown; try utf-8, latin-1, cp1252 or utf-16") from error

    def corpus_of(name: str) -> Corpus:
        train, validation = Source(
            name, encoding, encoding_errors, split, text_column, data_format, streaming, cache_dir
        ).read()
        return _cut(name, train, validation, validation_fraction)

    if (shares := mixture(data)) is None:
        return corpus_of(data)
    corpora = [corpus_of(name) for name in shares]
    weights = list(shares.values())
    parts = [corpus.validation for corpus in corpora if corpus.validation is not None]
    return Corpus(
        data,
        Mixture.of([corpus.train for corpus in corpora], weights),
        Mixture.of(parts, weights) if len(parts) == len(corpora) else None,
        "; ".join(f"of {corpus.name}: {corpus.cut}" for corpus in corpora),
    )


def mixture(data: str) -> dict[str, float] | None:
    """`one:0.7,other:0.3` -> {"one": 0.7, "other": 0.3}; None for what is no mixture. Shares are made to add up to 1."""
    if "," not in data or Path(data).exists():
        return None
    shares = {}
    for part in data.split(","):
        found = re.fullmatch(r"\s*(.+):([0-9.eE+-]+)\s*", part)
        try:
            shares[found[1]] = float(found[2])
        except (TypeError, ValueError):
            raise ValueError(
                f"{data}: {part.strip()!r} is no part of a mixture; write each as name:share, e.g. plays.txt:0.7,notes:0.3"
            ) from None
    if min(shares.values()) <= 0 or not np.isfinite(sum(shares.values())):
        raise ValueError(f"{data}: each share of a mixture must be more than 0")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def _cut(name: str, train: Texts, validation: Texts | None, fraction: float) -> Corpus:
    for part in (train, validation):
        if part is not None and part.characters == 0:
            raise ValueError(f"{name}: there is no text in it; give a file or a folder with some")
    if fraction == 0:
        return Corpus(name, train, None, "no validation")
    if validation is not None:
        return Corpus(name, train, validation, "the validation split that comes with it")
    if isinstance(train, StreamedDocuments):
        cut = f"documents with the lowest hash of their content, a share of {fraction:g}"
        return Corpus(name, replace(train, low=fraction), replace(train, high=fraction), cut)
    return _cut_documents(name, train, fraction)


def _cut_documents(name: str, whole: Documents, fraction: float) -> Corpus:
    if len(whole) >= FEWEST_DOCUMENTS_TO_CHOOSE_FROM:
        # Copies of a document have one hash, so they are on one side together.
        keys = whole.keys
        ranked = np.unique(keys)
        is_held_out = keys <= ranked[max(1, round(len(ranked) * fraction)) - 1]
        if not is_held_out.all():
            # By hash, too: the head of this part is a fair sample of it.
            held_out = np.flatnonzero(is_held_out)
            held_out = held_out[np.argsort(keys[held_out], kind="stable")]
            cut = f"{len(held_out)} of {len(whole)} documents, those with the lowest hash of their content"
            return Corpus(name, whole.select(~is_held_out), whole.select(held_out), cut)
    total = whole.characters
    cut_at = int(total * (1 - fraction))
    train, validation = whole.cut(cut_at)
    return Corpus(name, train, validation, f"the last {total - cut_at:,} of {total:,} characters")
