"""Drop duplicates among documents: exact copies, or also documents that have most of their word sequences in common.

Near duplicates are found by MinHash (Broder 1997) and locality-sensitive hashing (the package `rensa`): the similarity of two
documents is the share of their distinct sequences of `SHINGLE` words that both contain (Jaccard index), estimated from
`NUM_HASHES` hashes, which take 512 bytes of memory per document. The first of several duplicates is kept.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import MiniGPTError
from .arrays import blocks
from .cache import cached
from .documents import IndexedDocuments, StreamedDocuments, TextFiles

logger = logging.getLogger(__name__)

KINDS = ("none", "exact", "near")
VERSION = 2  # version of the format of the cached result
NUM_HASHES, THRESHOLD, SHINGLE = 128, 0.8, 5
# Documents are compared if all hashes of one of these groups are equal. With 8, the default of `rensa`, half of the documents
# that share 85 % of their sequences are never compared; with 16, fewer than 1 %.
NUM_BANDS = 16
CHARACTERS_PER_WORD = 20  # in a text with longer words, such as Chinese, sequences of characters are compared
BATCH_DOCUMENTS = 1000
DROPPED = "duplicates.jsonl"

Pairs = Iterator[tuple[int, int]]  # (position of a duplicate, position of the document that is kept)


@dataclass(frozen=True)
class Unique:
    """Documents without duplicates.

    Args:
        documents: Those that are kept.
        note: How many were dropped; '' for none.
        listing: File with a line for each dropped document: {"document": …, "duplicate_of": …}.
    """

    documents: IndexedDocuments
    note: str
    listing: Path


def without_duplicates(
    name: str, documents: IndexedDocuments | StreamedDocuments, kind: str, cache_dir: Path
) -> Unique:
    """Drop duplicates, and log their number.

    Args:
        name: Name of the source, for messages.
        kind: `exact` or `near`.
        cache_dir: Root of the cache, which stores the result.

    Raises:
        MiniGPTError: if the documents are streamed, or a package is missing.
    """
    if isinstance(documents, StreamedDocuments):
        raise MiniGPTError(f"{name}: --dedup {kind} requires all documents: omit --streaming")
    find = _exact if kind == "exact" else _near
    key = json.dumps(
        [VERSION, kind, documents.fingerprint, _names_sha256(documents), version("rensa") if _has_rensa(kind) else None]
    )

    def write(folder: Path) -> None:
        is_kept = np.ones(len(documents), bool)
        with (folder / DROPPED).open("w", encoding="utf-8") as file:
            for dropped, kept in find(documents):
                is_kept[dropped] = False
                described = (documents.source.describe(int(documents.index[one]["row"])) for one in (dropped, kept))
                line = dict(zip(("document", "duplicate_of"), described, strict=True))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        np.save(folder / "kept.npy", is_kept)

    folder, is_kept = cached(
        cache_dir / "duplicates" / hashlib.sha256(key.encode()).hexdigest()[:32],
        write,
        lambda folder: (folder, np.load(folder / "kept.npy")),
        cache_dir,
        "list of duplicates",
    )
    if is_kept.all():
        logger.info("%s: none of %s documents is %s duplicate", name, f"{len(documents):,}", _article(kind))
        return Unique(documents, "", folder / DROPPED)
    note = f"{np.count_nonzero(~is_kept):,} of {len(documents):,} documents dropped as {kind} duplicates"
    logger.info("%s: %s, which are listed in %s", name, note, folder / DROPPED)
    return Unique(documents.select(is_kept), note, folder / DROPPED)


def _names_sha256(documents: IndexedDocuments) -> str:
    """Return a hash of what determines the names of the documents in the list of duplicates."""
    source, digest = documents.source, hashlib.sha256()
    names = [source.name(path) for path in source.paths] if isinstance(source, TextFiles) else source.start
    digest.update(json.dumps(names).encode())
    for block in blocks(documents.index):
        digest.update(np.ascontiguousarray(block["row"]).tobytes())
    return digest.hexdigest()


def _article(kind: str) -> str:
    return f"{'an' if kind == 'exact' else 'a'} {kind}"


def _has_rensa(kind: str) -> bool:
    if kind != "near":
        return False
    try:
        import rensa  # noqa: F401
    except ImportError as error:
        raise MiniGPTError("--dedup near requires rensa: `pip install rensa`") from error
    return True


def _exact(documents: IndexedDocuments) -> Pairs:
    """Find copies by their SHA-256."""
    keys = documents.keys
    order = np.argsort(keys, kind="stable")
    is_repeated = keys[order[1:]] == keys[order[:-1]]  # compares the first 64 bits
    first: dict[bytes, int] = {}
    for position in np.unique(np.concatenate([order[1:][is_repeated], order[:-1][is_repeated]])).tolist():
        kept = first.setdefault(documents.index[position]["digest"].tobytes(), position)
        if kept != position:
            yield position, kept


def _near(documents: IndexedDocuments) -> Pairs:
    """Find documents that are similar to an earlier one that is kept."""
    from rensa import RMinHash, RMinHashDeduplicator

    found = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=NUM_HASHES, use_lsh=True, num_bands=NUM_BANDS)
    texts, start = iter(documents), 0
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        sketches = RMinHash.from_token_sets(map(shingles, batch), num_perm=NUM_HASHES, seed=42)
        for position, sketch in enumerate(sketches, start):
            if not found.add(str(position), sketch):
                yield position, min(map(int, found.get_duplicates(sketch)))
        start += len(batch)


def shingles(text: str) -> Iterable[str]:
    """Return the sequences of words that represent a document; of characters if it has few or very long words."""
    words = text.split()
    if len(words) < SHINGLE or len(text) > CHARACTERS_PER_WORD * len(words):
        return [text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))]
    return list(map(" ".join, zip(*(words[start:] for start in range(SHINGLE)), strict=False)))
