"""Text on disk -> tokens on disk, ready to train on: our way and that of transformers' `run_clm.py`, in MB/s.

Ours reads documents and writes one stream. `run_clm.py` reads lines, tokenizes them with `datasets.map` and joins them into
blocks with another (`group_texts`). The same tokenizer, files and number of processes; by turns; nothing is cached; the
start of Python and imports are left out. Memory is that of the largest process, for the text and for four times as much.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK_SIZE = 256
FILE_BYTES = 500_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument(
        "--data", default="stdlib", help="as in `minigpt train`; used again and again to the size wanted"
    )
    parser.add_argument("--megabytes", type=float, default=20, help="of text (default: 20)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes of each (default: 1)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer, byte-level BPE (default: 4096)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Let both tokenize the text in turn, then four times the text once each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = child("prepare", args.data, folder, args.megabytes, args.vocab_size)["megabytes"]
        seen: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for repeat in range(args.repeats):
            for way in WAYS:
                seen[way].append(child(way, folder / "text-1", folder, args.num_proc))
            print(f"round {repeat + 1} of {args.repeats}", file=sys.stderr)
        large = {way: child(way, folder / "text-4", folder, args.num_proc) for way in WAYS}
    table = []
    for way, results in seen.items():
        middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
        row = {"way": way, "MB_per_second": round(megabytes / middle["seconds"], 2)}
        row |= {"seconds": round(middle["seconds"], 2), "cpu_seconds": round(middle["cpu_seconds"], 2)}
        row |= {"tokens": f"{middle['tokens']:,.0f}", "peak_MB": round(middle["peak_megabytes"])}
        table.append(row | {"peak_MB_of_4_times_the_text": round(large[way]["peak_megabytes"])})
    pairs = list(zip(seen["run_clm"], seen["ours"], strict=True))
    return {
        "megabytes_of_text": round(megabytes, 1),
        "processes": args.num_proc,
        "tokenizing": table,
        **{
            f"ours_over_run_clm_by_{name}": round(statistics.median(a[key] / b[key] for a, b in pairs), 2)
            for name, key in (("clock", "seconds"), ("processor", "cpu_seconds"))
        },
    }


def child(*words: Any) -> dict[str, float]:
    """Do one thing in a process of its own: Linux counts the memory of this one into its peak, so this one stays small."""
    from benchmarks.process import timed

    done = timed([sys.executable, "-m", "benchmarks.data", *words], PYTHONPATH=str(Path(__file__).parents[1]))
    return json.loads(done.output.splitlines()[-1]) | {"peak_megabytes": done.megabytes}


def prepare(data: str, folder: Path, megabytes: float, vocab_size: int) -> dict[str, float]:
    """A tokenizer, and the text at both sizes."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.tokenizer import byte_level_bpe

    text = "\n".join(load_corpus(data, 0.0).train)
    byte_level_bpe([text[:2_000_000]], vocab_size).save_pretrained(folder / "tokenizer")
    write_text(folder / "text-4", text, megabytes * 4)
    return {"megabytes": write_text(folder / "text-1", text, megabytes)}


def write_text(folder: Path, text: str, megabytes: float) -> float:
    """Files of about half a megabyte, each with a first line of its own; return how many megabytes they are."""
    folder.mkdir()
    size, number = 0, 0
    characters = min(FILE_BYTES, len(text))
    while size < megabytes * 1e6:
        start = number * characters % max(1, len(text) - characters)
        written = f"file {number}\n{text[start : start + characters]}"
        (folder / f"{number:06}.txt").write_text(written, encoding="utf-8")
        size, number = size + len(written.encode()), number + 1
    return size / 1e6


def our_way(folder: Path, tokenizer: Any, cache: Path, num_proc: int) -> int:
    """What `minigpt train` does."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.stream import build_stream

    return len(build_stream(load_corpus(str(folder), 0.0).train, tokenizer, cache, num_proc))


def run_clm_way(folder: Path, tokenizer: Any, cache: Path, num_proc: int) -> int:
    """What `run_clm.py` does: two passes of `map`, a thousand lines at a time."""
    from itertools import chain

    from datasets import load_dataset

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        blocks = {name: [ids[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)] for name, ids in joined.items()}
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    files = [str(file) for file in sorted(folder.iterdir())]
    lines = load_dataset("text", data_files=files, split="train", keep_linebreaks=True)
    processes = num_proc if num_proc > 1 else None
    tokens = lines.map(lambda rows: tokenizer(rows["text"]), batched=True, num_proc=processes, remove_columns="text")
    return len(tokens.map(group, batched=True, num_proc=processes)) * BLOCK_SIZE


WAYS = {"ours": our_way, "run_clm": run_clm_way}


def main() -> None:
    """One of the processes that `run` measures."""
    import datasets
    from transformers import AutoTokenizer

    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.data import stream  # noqa: F401 (what is imported is not measured)

    quiet()
    what, *words = sys.argv[1:]
    if what == "prepare":
        print(json.dumps(prepare(words[0], Path(words[1]), float(words[2]), int(words[3]))))
        return
    folder, num_proc = Path(words[1]), int(words[2])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache) / "datasets"  # nothing is found again
        began, busy = time.perf_counter(), sum(os.times()[:4])
        tokens = WAYS[what](Path(words[0]), tokenizer, Path(cache), num_proc)
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": sum(os.times()[:4]) - busy, "tokens": tokens}
    print(json.dumps(took))


if __name__ == "__main__":
    main()
