"""Tokenization throughput and memory, from files to a training set on disk, compared with transformers' `run_clm.py`.

minigpt-hf reads documents and writes one token stream. `run_clm.py` reads lines, tokenizes them with `datasets.map` and
concatenates them into sequences with a second `map` (`group_texts`). Every case is a process with an empty cache, except for
`second start`, which reads the cache of `first start`. All cases alternate for several rounds, and ratios are those of the
throughput to the first case in the same round: `run_clm.py` on one file, unless `--cases` lists others. Times exclude the
start of Python and imports; CPU time is comparable if other programs use the cores. Memory is the peak of the process,
mapped pages included.

The text is the standard library, repeated with rotated lines. With MINIGPT_GIGABYTES=1 in the environment, the text of the
first and second start has a gigabyte, and there are 200,000 files of 1 kB and a line of 100 MB.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BLOCK_SIZE = 256
GIGABYTES = float(os.environ.get("MINIGPT_GIGABYTES", "0"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--megabytes", type=float, default=8, help="size of each text (default: 8)")
    parser.add_argument(
        "--vocab_size", type=int, default=8192, help="vocabulary size of the byte-level BPE tokenizer (default: 8192)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--cases", help=f"comma-separated; default: all of {', '.join(CASES)}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate all cases for several rounds."""
    names = list(CASES) if args.cases is None else args.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"--cases: unknown case {unknown[0]!r}; give one or several of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as root:
        run_process("prepare", root, args.megabytes, args.vocab_size)
        rounds = []
        for repeat in range(args.repeats):
            rounds.append({name: run_process(name, root) for name in dict.fromkeys(names)})
            print(f"round {repeat + 1} of {args.repeats}", file=sys.stderr)
    return {
        "encoders": ", ".join(f"{name} {installed_version(name)}" for name in ("fastokens", "tiktoken", "tokenizers")),
        "tokenizing": [row(name, rounds) for name in rounds[0]],
    }


def row(name: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians of a case, and of its ratios to the first case within a round."""
    first = next(iter(rounds[0]))

    def median(value: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return statistics.median(map(value, rounds))

    return {
        "case": name,
        "MB": round(median(lambda one: one[name]["megabytes"]), 1),
        "seconds": round(median(lambda one: one[name]["seconds"]), 2),
        "CPU_seconds": round(median(lambda one: one[name]["cpu_seconds"]), 2),
        **{
            f"ratio_by_{label}": round(
                median(
                    lambda one, key=key: (
                        one[name]["megabytes"] / one[name][key] / (one[first]["megabytes"] / one[first][key])
                    )
                ),
                2,
            )
            for label, key in (("time", "seconds"), ("CPU_time", "cpu_seconds"))
        },
        "peak_MB": round(median(lambda one: one[name]["peak_megabytes"])),
    }


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def run_process(*arguments: Any) -> dict[str, float]:
    """Run one case in a subprocess.

    On Linux the peak memory of a child starts at that of its parent, so this process imports nothing large.
    """
    from benchmarks.process import timed

    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = timed([sys.executable, "-m", "benchmarks.data", *arguments], PYTHONPATH=path)
    return json.loads(process.output.splitlines()[-1]) | {"peak_megabytes": process.megabytes}


# -- texts ------------------------------------------------------------------------------------------------------------


def prepare(root: Path, megabytes: float, vocab_size: int) -> None:
    """Write the texts and train the tokenizers."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer, character_tokenizer

    text = "\n".join(load_corpus("stdlib", 0.0).train)
    lines = text.splitlines(keepends=True)
    size = round(megabytes * 1e6)
    large = max(size, round(GIGABYTES * 1e9))
    write_files(root / "one file", lines, size, size)
    write_files(root / "5 kB files", lines, size, 5_400)
    write_files(root / "1 kB files", lines, max(size, round(GIGABYTES * 200e6)), 1_000)
    write_files(root / "one line", [line.rstrip() + " " for line in lines], max(size, round(GIGABYTES * 1e8)), None)
    write_files(root / "first start", lines, large, large)
    for name, tokenizer in (
        ("bpe", byte_level_bpe([text[:4_000_000]], vocab_size)),
        ("characters", character_tokenizer([text, "file 0123456789\n"])),
        ("bytes", byte_tokenizer()),
    ):
        tokenizer.save_pretrained(root / "tokenizers" / name)


def write_files(folder: Path, lines: list[str], size: int, file_bytes: int | None) -> None:
    """Write a text of `size` bytes.

    Args:
        file_bytes: Approximate size of a file, which has a distinct first line; None for one file without line endings.
    """
    folder.mkdir()
    rotated, number = rotations(lines), 0
    while size > 0:
        name = folder / f"{number // 1000:04}" / f"{number:06}.txt"
        name.parent.mkdir(exist_ok=True)
        remaining = min(size, file_bytes or size)
        with name.open("w", encoding="utf-8") as file:
            remaining -= file.write(f"file {number}" + " \n"[file_bytes is not None])
            while remaining > 0:
                line = next(rotated)[: max(remaining, 1)]
                remaining -= len(line.encode())
                file.write(line)
        size -= name.stat().st_size
        number += 1


def rotations(lines: list[str]) -> Iterator[str]:
    """Repeat lines from different starts, so that no two long passages are equal."""
    while True:
        for start in range(0, len(lines), 7):
            yield from lines[start:]
            yield from lines[:start]


# -- cases ------------------------------------------------------------------------------------------------------------


def stream_of(root: Path, cache: Path, text: str, tokenizer: Any, num_proc: int) -> int:
    """Tokenize as `minigpt tokenize` does, with an existing tokenizer. Returns the number of tokens."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.stream import build_stream

    return len(build_stream(load_corpus(str(root / text), 0.0, cache_dir=cache).train, tokenizer, cache, num_proc))


def start(root: Path, cache: Path, text: str, tokenizer: Any, num_proc: int) -> int:
    """Train the tokenizer and tokenize as `minigpt train` does, or read both from the cache of the previous case."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.prepared import prepare

    corpus = load_corpus(str(root / text), 0.01, cache_dir=root / "cache")
    prepared = prepare(
        corpus, "bpe", 8192, root / "cache", block_size=BLOCK_SIZE, validation_characters=100_000, num_proc=num_proc
    )
    return len(prepared.train)


def shards(root: Path, cache: Path, text: str, tokenizer: Any, processes: int) -> int:
    """Tokenize as `minigpt tokenize --shard` does, each shard in a process with one thread. Returns the number of tokens."""
    from minigpt_hf.data.files import Share
    from minigpt_hf.training.arguments import DataArguments
    from minigpt_hf.training.text import prepare_shard

    settings = {"validation_fraction": 0.0, "cache_dir": str(cache), "num_proc": 1}
    data = DataArguments(data=str(root / text), tokenizer=str(root / "tokenizers" / "bpe"), **settings)
    in_processes(prepare_shard, [(data, Share(i, processes), cache / "shards") for i in range(processes)])
    return sum(file.stat().st_size for file in (cache / "shards").rglob("tokens.bin")) // 2  # uint16


def hashing(root: Path, cache: Path, text: str, tokenizer: Any, processes: int) -> int:
    """Compute SHA-256 of 20 times the size of the text, from 64 kB in the processor's cache. Returns 0 tokens.

    Independent of memory and files, so the gain of a second process is the most that this machine allows.
    """
    size = sum(file.stat().st_size for file in (root / text).rglob("*.txt"))
    in_processes(hash_blocks, [(20 * size // processes // 65536,)] * processes)
    return 0


def hash_blocks(blocks: int) -> None:
    digest, block = hashlib.sha256(), bytes(65536)
    for _ in range(blocks):
        digest.update(block)


def in_processes(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> None:
    """Call a function once for each tuple of arguments, each in a forked process, so that imports are not measured."""
    started = [get_context("fork").Process(target=function, args=each) for each in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0


def run_clm(root: Path, cache: Path, text: str, tokenizer: Any, num_proc: int) -> int:
    """Tokenize as `run_clm.py` does, with two passes of `map`. Returns the number of tokens."""
    from itertools import chain

    from datasets import load_dataset

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        sequences = {
            name: [ids[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)] for name, ids in joined.items()
        }
        sequences["labels"] = sequences["input_ids"].copy()
        return sequences

    files = [str(file) for file in sorted((root / text).rglob("*.txt"))]
    lines = load_dataset("text", data_files=files, split="train", keep_linebreaks=True)
    tokens = lines.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
    return len(tokens.map(group, batched=True)) * BLOCK_SIZE


# Name -> (function, text, tokenizer, number of threads or processes). Cases run in this order.
CASES: dict[str, tuple[Callable[[Path, Path, str, Any, int], int], str, str, int]] = {
    "run_clm": (run_clm, "one file", "bpe", 1),
    "one file": (stream_of, "one file", "bpe", 1),
    "2 threads": (stream_of, "one file", "bpe", 2),
    "5 kB files": (stream_of, "5 kB files", "bpe", 1),
    "one shard": (shards, "5 kB files", "bpe", 1),
    "2 shards": (shards, "5 kB files", "bpe", 2),
    "hashing": (hashing, "5 kB files", "bpe", 1),
    "hashing in 2 processes": (hashing, "5 kB files", "bpe", 2),
    "1 kB files": (stream_of, "1 kB files", "bpe", 1),
    "one line": (stream_of, "one line", "bpe", 1),
    "characters": (stream_of, "one file", "characters", 1),
    "bytes": (stream_of, "one file", "bytes", 1),
    "first start": (start, "first start", "bpe", 2),
    "second start": (start, "first start", "bpe", 2),
}


def main() -> None:
    """Entry point of the processes started by `run`."""
    import datasets
    from transformers import AutoTokenizer

    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.data import prepared  # noqa: F401 (imports are not measured)
    from minigpt_hf.training.text import prepare_shard  # noqa: F401

    quiet()
    name, root = sys.argv[1], Path(sys.argv[2])
    if name == "prepare":
        prepare(root, float(sys.argv[3]), int(sys.argv[4]))
        print("{}")
        return
    function, text, kind, num_proc = CASES[name]
    if name == "first start":
        shutil.rmtree(root / "cache", ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizers" / kind)
    size = sum(file.stat().st_size for file in (root / text).rglob("*.txt"))
    with tempfile.TemporaryDirectory(dir=root) as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache) / "datasets"  # no cached result is reused
        began, cpu_began = time.perf_counter(), sum(os.times()[:4])
        tokens = function(root, Path(cache), text, tokenizer, num_proc)
        result = {"seconds": time.perf_counter() - began, "cpu_seconds": sum(os.times()[:4]) - cpu_began}
    print(json.dumps(result | {"megabytes": size / 1e6, "tokens": tokens}))


if __name__ == "__main__":
    main()
