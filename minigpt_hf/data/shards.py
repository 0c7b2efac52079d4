"""Tokenize a corpus in shards, on one machine or many, and merge the shards by writing an index.

Each shard holds a contiguous share of the files or rows, and is written by a process of its own:

    tokenizer/                    of all shards, written by the first process
    shard-00003-of-00016/         written atomically
        train/  validation/       token streams, see `stream`
        shard.json                settings, tokenizer, and the inputs of which this is a share
        manifest.json             size and SHA-256 of each file
    index/                        written by `merge_shards`: a prepared text (see `prepared`) whose streams list the shards,
                                  and whose manifest includes their files

The tokens of the merged text are those that one process would write, in the same order. The files of datatrove's
`DocumentTokenizer` (`.ds` with `.ds.index`) are merged in the same way.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..atomic import MANIFEST, fsync, new_folder, read_manifest, seal, sha256
from ..errors import MiniGPTError
from .cache import verification_error
from .corpus import Corpus, public_name
from .datatrove import count_tokens
from .files import Share
from .prepared import TEXT_SETTINGS, VERSION, ValidationSample, join_listings
from .stream import TokenStream, stream_fingerprint, write_stream
from .tokenizer import bos_token_id, load_tokenizer, tokenizer_fingerprint, vocabulary_size

logger = logging.getLogger(__name__)

SHARD_VERSION = 1  # version of the format of a shard
NAME = re.compile(r"shard-(\d{5})-of-(\d{5})")
STREAM_FILES = ("tokens.bin", "documents.npy", "stream.json")
# Settings of a text that another program has tokenized.
UNKNOWN_SETTINGS = dict.fromkeys(TEXT_SETTINGS) | {
    "dedup": "none",
    "encoding": "utf-8",
    "encoding_errors": "strict",
    "newline": "preserve",
    "streaming": False,
    "validation_fraction": 0.0,
    "validation_characters": 1,
    "vocab_size": 258,
}
SHOWN = 10  # names in a message


def is_complete(output: Path, share: Share, expected: dict[str, Any], cache_dir: Path) -> bool:
    """Return whether a shard has been written with the given settings.

    Args:
        output: The folder of all shards.
        expected: Entries of `shard.json`, see `description_of`.

    Raises:
        MiniGPTError: if it is damaged, or was written with other settings.
    """
    folder = output / str(share)
    if not folder.exists():
        return False
    if (fault := verification_error(folder, cache_dir)) is not None:
        raise MiniGPTError(f"{folder}: this shard is damaged ({fault}): remove it, and write it again")
    if different := _differences(expected, _read_shard(folder)):
        raise MiniGPTError(
            f"{folder}: was written with other {', '.join(different)}: remove it, or give another --output_dir"
        )
    return True


def description_of(
    tokenizer: PreTrainedTokenizerBase, kind: str, share: Share, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the entries of `shard.json` that are known before the text is read."""
    chosen = {name: settings[name] for name in TEXT_SETTINGS} | {"tokenizer": public_name(kind)}
    return {
        "version": SHARD_VERSION,
        "shard": asdict(share),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "settings": chosen,
    }


def share_tokenizer(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer of all shards, or check that it is the given one.

    Raises:
        MiniGPTError: if the folder has shards of another tokenizer.
    """
    folder = output / "tokenizer"
    if not folder.exists():
        try:
            with new_folder(folder) as content:
                tokenizer.save_pretrained(content)
        except MiniGPTError:  # another process has written it in the meantime
            if not folder.exists():
                raise
    shared = load_tokenizer(str(folder))
    is_same = tokenizer_fingerprint(shared) == tokenizer_fingerprint(tokenizer)
    if not is_same or bos_token_id(shared) != bos_token_id(tokenizer):
        raise MiniGPTError(f"{output}: has shards of another tokenizer; give another --output_dir")


def write_shard(
    output: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    share: Share,
    description: dict[str, Any],
    *,
    lossy: str | None,
    block_size: int,
    num_proc: int | None = None,
    progress: Callable[[int], None] = lambda characters: None,
) -> None:
    """Encode a share of a corpus and write it atomically.

    Args:
        output: The folder of all shards.
        corpus: The share, see `load_corpus`.
        description: See `description_of`.
        lossy: What the tokenizer loses of the text; None if decoding restores it.
        block_size: Length of an evaluation window in tokens.
        num_proc: Number of encoding threads.
        progress: See `build_stream`.

    Raises:
        MiniGPTError: if another process has written the shard in the meantime.
        OSError: if it cannot be written; no partial folder remains.
    """
    settings = description["settings"]
    max_tokens = None if settings["max_tokens"] is None else len(share.of_rows(settings["max_tokens"]))
    with new_folder(output / str(share)) as content:
        fingerprint = stream_fingerprint(corpus.train, tokenizer)
        (content / "train").mkdir()
        write_stream(
            content / "train",
            fingerprint if max_tokens is None else f"{fingerprint}-at-most-{max_tokens}",
            corpus.train,
            tokenizer,
            num_proc,
            progress,
            max_tokens,
        )
        train = TokenStream.open(content / "train")
        scored = None
        if corpus.validation is not None:
            window = max(1, round(block_size * train.characters / max(1, len(train) - len(train.documents))))
            sample = corpus.validation.sample(len(share.of_rows(settings["validation_characters"])), window)
            (content / "validation").mkdir()
            write_stream(content / "validation", stream_fingerprint(sample, tokenizer), sample, tokenizer, num_proc)
            validation = TokenStream.open(content / "validation")
            scored = ValidationSample(
                sample.number_of_documents or len(validation.documents),
                corpus.validation.number_of_documents,
                validation.characters,
                corpus.validation.characters,
                window,
            )
        metadata = description | {
            "inputs": corpus.inputs,
            "name": public_name(corpus.name),
            "cut": corpus.split_description,
            "lossy": lossy,
            "dropped": join_listings(corpus.duplicates, content),
            "scored": None if scored is None else asdict(scored),
        }
        (content / "shard.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        seal(content)


def _read_shard(folder: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
        version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MiniGPTError(f"{folder}: this shard cannot be read ({error}): remove it, and write it again") from error
    if version != SHARD_VERSION:
        raise MiniGPTError(
            f"{folder}: this shard has format {version}, and {SHARD_VERSION} is required: write it again"
        )
    return metadata


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the names of the entries and settings that differ."""
    names = [name for name, value in expected.items() if name != "settings" and found.get(name) != value]
    settings, others = expected.get("settings", {}), found.get("settings", {})
    return names + [name for name, value in settings.items() if name != "tokenizer" and others.get(name) != value]


# -- merging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedStream:
    """The index of a stream: the content of `stream.json`, and the files of its shards with size and SHA-256."""

    metadata: dict[str, Any]
    files: dict[str, dict[str, Any]]


def merge_shards(output: Path, cache_dir: Path, tokenizer: str | None = None) -> str:
    """Verify the shards in a folder and write their index, unless it exists and is valid.

    Args:
        output: The folder of all shards, or of `.ds` files of datatrove.
        cache_dir: Root of the cache, which records the files that have been verified.
        tokenizer: Folder or Hub id of the tokenizer; required for datatrove, otherwise checked if given.

    Returns:
        A summary.

    Raises:
        MiniGPTError: if a shard is missing, damaged, occurs twice, or has other settings or another tokenizer.
    """
    folders = sorted(path for path in output.glob("shard-*-of-*") if path.is_dir())
    files = sorted(output.rglob("*.ds")) if not folders else []
    if not folders and not files:
        raise MiniGPTError(
            f"{output}: has neither shards nor .ds files of datatrove; write shards with `minigpt tokenize --shard I/N`"
        )
    if tokenizer is None and not folders:
        raise MiniGPTError(f"{output}: has files of datatrove, which do not contain their tokenizer; give --tokenizer")
    loaded = load_tokenizer(str(output / "tokenizer") if tokenizer is None else tokenizer)
    if folders:
        metadata, streams = _of_shards(folders, loaded, cache_dir)
    else:
        metadata, streams = _of_datatrove(output, files, loaded, public_name(tokenizer))
    index, content = output / "index", {name: stream.metadata for name, stream in streams.items()}
    summary = ", ".join(
        f"{one['tokens']:,} {name} tokens of {one['documents']:,} documents" for name, one in content.items()
    )
    summary = f"{output}: {len(folders or files):,} {'shards' if folders else 'files'}, {summary}"
    if index.exists():
        fault = verification_error(index, cache_dir)
        if fault is None and all(_is_merged(index / name, one) for name, one in content.items()):
            return f"{summary}; already merged"
        raise MiniGPTError(f"{index}: is the index of other shards ({fault or 'they have changed'}): remove it first")
    with new_folder(index) as folder:
        loaded.save_pretrained(folder / "tokenizer")
        for name, one in content.items():
            (folder / name).mkdir()
            (folder / name / "stream.json").write_text(json.dumps(one, indent=2) + "\n", encoding="utf-8")
        (folder / "prepared.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        seal(folder)
        manifest = read_manifest(folder)
        for stream in streams.values():
            manifest |= {f"../{name}": entry for name, entry in stream.files.items()}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        fsync(folder / MANIFEST)
    return summary


def _is_merged(folder: Path, metadata: dict[str, Any]) -> bool:
    return folder.is_dir() and json.loads((folder / "stream.json").read_text(encoding="utf-8")) == metadata


def _of_shards(
    folders: list[Path], tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> tuple[dict[str, Any], dict[str, MergedStream]]:
    """Verify shards. Returns the content of `prepared.json`, and the index of each stream."""
    output, numbers = folders[0].parent, {folder.name: NAME.fullmatch(folder.name) for folder in folders}
    counts = {int(match[2]) if match else 0 for match in numbers.values()}
    if len(counts) > 1:
        raise MiniGPTError(
            f"{output}: has shards of runs with different numbers of shards ({', '.join(map(str, sorted(counts)))}): keep "
            "those of one"
        )
    (count,) = counts
    if missing := sorted(set(range(count)) - {int(match[1]) for match in numbers.values() if match}):
        names = ", ".join(map(str, missing[:SHOWN])) + ", …" * (len(missing) > SHOWN)
        raise MiniGPTError(
            f"{output}: missing shards: {len(missing):,} of {count:,} ({names}): write them with "
            f"`minigpt tokenize --shard {missing[0]}/{count}`"
        )
    damaged = {folder.name: fault for folder in folders if (fault := verification_error(folder, cache_dir)) is not None}
    if damaged:
        name, fault = next(iter(damaged.items()))
        raise MiniGPTError(
            f"{output}: damaged shards: {len(damaged):,} of {count:,} ({name}: {fault}): remove and write them again: "
            f"{', '.join(list(damaged)[:SHOWN])}{', …' * (len(damaged) > SHOWN)}"
        )
    shards = {folder: _read_shard(folder) for folder in folders}
    first = shards[folders[0]]
    common = {name: first[name] for name in ("inputs", "settings")} | {"tokenizer": tokenizer_fingerprint(tokenizer)}
    for number, (folder, shard) in enumerate(shards.items()):
        if shard["shard"] != asdict(Share(number, count)):
            raise MiniGPTError(
                f"{folder}: is a copy of shard {shard['shard']['index']} of {shard['shard']['count']}: remove it, and write "
                "this shard"
            )
        if different := _differences(common, shard):
            raise MiniGPTError(
                f"{folder}: has other {', '.join(different)} than {folders[0].name if number else 'the tokenizer'}: write "
                "all shards with the same data, settings and tokenizer"
            )
    streams = {
        name: _merged([folder / name for folder in folders], tokenizer)
        for name in ("train", "validation")
        if (folders[0] / name).is_dir()
    }
    scored = [ValidationSample(**shard["scored"]) for shard in shards.values() if shard["scored"]]
    is_held_out = bool(scored) and streams["validation"].metadata["tokens"] > 0
    if scored and not is_held_out:
        logger.warning("%s: no document is held out for validation; raise --validation_fraction", output)
        del streams["validation"]
    without = first["cut"] if first["cut"].startswith("no validation") else "no validation"
    cut = f"{first['cut']}; {count:,} shards" if is_held_out else without
    if dropped := sum(shard["dropped"] for shard in shards.values()):
        cut += f"; {dropped:,} documents dropped as {first['settings']['dedup']} duplicates of others in their shards"
    return {
        "version": VERSION,
        "name": first["name"],
        "cut": cut,
        "kind": first["settings"]["tokenizer"],
        "lossy": next((shard["lossy"] for shard in shards.values() if shard["lossy"]), None),
        "settings": first["settings"] | ({} if is_held_out else {"validation_fraction": 0.0}),
        "scored": asdict(_total(scored)) if is_held_out else None,
        "shards": count,
    }, streams


def _total(samples: list[ValidationSample]) -> ValidationSample:
    def total(numbers: Iterable[int | None]) -> int | None:
        known = list(numbers)
        return None if None in known else sum(number or 0 for number in known)

    return ValidationSample(
        sum(sample.documents for sample in samples),
        total(sample.of_documents for sample in samples),
        sum(sample.characters for sample in samples),
        total(sample.of_characters for sample in samples),
        max(sample.window for sample in samples),
    )


def _merged(folders: list[Path], tokenizer: PreTrainedTokenizerBase) -> MergedStream:
    """Return the index of the streams of shards, which have been verified."""
    shards: list[dict[str, Any]] = []
    files: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    first: dict[str, str] = {}  # path of the first shard with each text
    for folder in folders:
        stream = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        TokenStream.open(folder)
        path = f"{folder.parent.name}/{folder.name}"
        if stream["tokens"]:
            shards.append({"path": path} | {name: stream[name] for name in COUNTS})
            texts.append(stream["fingerprint"])
            if (same := first.setdefault(stream["fingerprint"], path)) != path:
                logger.warning("%s and %s contain the same text, which occurs twice in the inputs", same, path)
        manifest = read_manifest(folder.parent)
        files |= {f"{path}/{name}": manifest[f"{folder.name}/{name}"] for name in STREAM_FILES}
    return MergedStream(_index(shards, tokenizer, texts), files)


COUNTS = ("tokens", "documents", "characters", "bytes")


def _index(shards: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """Return the content of `stream.json`.

    Args:
        texts: Identify the texts of the shards, in order.
    """
    content = json.dumps(texts)
    return {
        "dtype": "<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4",
        "end_of_text": bos_token_id(tokenizer),
        **{name: sum(shard[name] for shard in shards) for name in COUNTS},
        "fingerprint": f"{hashlib.sha256(content.encode()).hexdigest()[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}",
        "shards": [{name: shard[name] for name in ("path", "tokens", "documents")} for shard in shards],
    }


def _of_datatrove(
    output: Path, files: list[Path], tokenizer: PreTrainedTokenizerBase, kind: str | None
) -> tuple[dict[str, Any], dict[str, MergedStream]]:
    """Verify files of datatrove. Returns the content of `prepared.json`, and the index of the training stream."""
    shards: list[dict[str, Any]] = []
    entries: dict[str, dict[str, Any]] = {}
    hashes: list[str] = []
    for file in files:
        counts = count_tokens(file, tokenizer)
        if not counts["tokens"]:
            continue
        path = file.relative_to(output).as_posix()
        shards.append({"path": path, **counts})
        for name in (path, f"{path}.index"):
            entries[name] = {"size": (output / name).stat().st_size, "sha256": sha256(output / name)}
        hashes.append(str(entries[path]["sha256"]))
    if not shards:
        raise MiniGPTError(f"{output}: its {len(files):,} files of datatrove have no tokens")
    return {
        "version": VERSION,
        "name": public_name(str(output)),
        "cut": "no validation",
        "kind": kind,
        "lossy": None,
        "settings": {**UNKNOWN_SETTINGS, "tokenizer": kind},
        "scored": None,
        "shards": len(shards),
    }, {"train": MergedStream(_index(shards, tokenizer, hashes) | {"format": "datatrove"}, entries)}
