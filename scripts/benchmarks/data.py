"""Tokenization throughput, from text files to a training set on disk, compared with transformers' `run_clm.py`.

minigpt-hf reads documents and writes one token stream. `run_clm.py` reads lines, tokenizes them with `datasets.map` and
concatenates them into sequences with a second `map` (`group_texts`). Both use the same tokenizer, files and number of
processes, alternate for several rounds and start with empty caches. Times exclude the start of Python and imports.
Memory is the peak of the largest process, also measured for four times the text.
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
    """Add the options of this benchmark."""
    parser.add_argument("--data", default="stdlib", help="as in `minigpt train`; repeated up to the given size")
    parser.add_argument("--megabytes", type=float, default=20, help="size of the text (default: 20)")
    parser.add_argument("--num_proc", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument(
        "--vocab_size", type=int, default=4096, help="vocabulary size of the byte-level BPE tokenizer (default: 4096)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds (default: 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate both pipelines on the text, then run each once on four times the text."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        megabytes = run_process("prepare", args.data, folder, args.megabytes, args.vocab_size)["megabytes"]
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in PIPELINES}
        for repeat in range(args.repeats):
            for name in PIPELINES:
                rounds[name].append(run_process(name, folder / "text-1", folder, args.num_proc))
            print(f"round {repeat + 1} of {args.repeats}", file=sys.stderr)
        large = {name: run_process(name, folder / "text-4", folder, args.num_proc) for name in PIPELINES}
    table = []
    for name, results in rounds.items():
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        row = {"pipeline": name, "MB_per_second": round(megabytes / medians["seconds"], 2)}
        row |= {"seconds": round(medians["seconds"], 2), "cpu_seconds": round(medians["cpu_seconds"], 2)}
        row |= {"tokens": f"{medians['tokens']:,.0f}", "peak_MB": round(medians["peak_megabytes"])}
        table.append(row | {"peak_MB_for_4_times_the_text": round(large[name]["peak_megabytes"])})
    pairs = list(zip(rounds["run_clm"], rounds["minigpt"], strict=True))
    return {
        "megabytes_of_text": round(megabytes, 1),
        "processes": args.num_proc,
        "tokenizing": table,
        **{
            f"speedup_over_run_clm_by_{name}": round(statistics.median(a[key] / b[key] for a, b in pairs), 2)
            for name, key in (("wall_time", "seconds"), ("cpu_time", "cpu_seconds"))
        },
    }


def run_process(*arguments: Any) -> dict[str, float]:
    """Run one measurement in a subprocess.

    On Linux the peak memory of a child starts at that of its parent, so this process imports nothing large.
    """
    from benchmarks.process import timed

    process = timed([sys.executable, "-m", "benchmarks.data", *arguments], PYTHONPATH=str(Path(__file__).parents[1]))
    return json.loads(process.output.splitlines()[-1]) | {"peak_megabytes": process.megabytes}


def prepare(data: str, folder: Path, megabytes: float, vocab_size: int) -> dict[str, float]:
    """Train the tokenizer and write the text in both sizes. Returns the size of the smaller one."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.tokenizer import byte_level_bpe

    text = "\n".join(load_corpus(data, 0.0).train)
    byte_level_bpe([text[:2_000_000]], vocab_size).save_pretrained(folder / "tokenizer")
    write_text(folder / "text-4", text, megabytes * 4)
    return {"megabytes": write_text(folder / "text-1", text, megabytes)}


def write_text(folder: Path, text: str, megabytes: float) -> float:
    """Write files of about half a megabyte, each with a distinct first line. Returns their total size in MB."""
    folder.mkdir()
    size, number = 0, 0
    characters = min(FILE_BYTES, len(text))
    while size < megabytes * 1e6:
        start = number * characters % max(1, len(text) - characters)
        content = f"file {number}\n{text[start : start + characters]}"
        (folder / f"{number:06}.txt").write_text(content, encoding="utf-8")
        size, number = size + len(content.encode()), number + 1
    return size / 1e6


def minigpt_pipeline(folder: Path, tokenizer: Any, cache: Path, num_proc: int) -> int:
    """Tokenize as `minigpt train` does. Returns the number of tokens."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.stream import build_stream

    return len(build_stream(load_corpus(str(folder), 0.0).train, tokenizer, cache, num_proc))


def run_clm_pipeline(folder: Path, tokenizer: Any, cache: Path, num_proc: int) -> int:
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

    files = [str(file) for file in sorted(folder.iterdir())]
    lines = load_dataset("text", data_files=files, split="train", keep_linebreaks=True)
    processes = num_proc if num_proc > 1 else None
    tokens = lines.map(lambda rows: tokenizer(rows["text"]), batched=True, num_proc=processes, remove_columns="text")
    return len(tokens.map(group, batched=True, num_proc=processes)) * BLOCK_SIZE


PIPELINES = {"minigpt": minigpt_pipeline, "run_clm": run_clm_pipeline}


def main() -> None:
    """Entry point of the processes started by `run`."""
    import datasets
    from transformers import AutoTokenizer

    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.data import stream  # noqa: F401 (imports are not measured)

    quiet()
    name, *arguments = sys.argv[1:]
    if name == "prepare":
        data, folder, megabytes, vocab_size = arguments
        print(json.dumps(prepare(data, Path(folder), float(megabytes), int(vocab_size))))
        return
    text, folder, num_proc = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache) / "datasets"  # no cached result is reused
        start, cpu_start = time.perf_counter(), sum(os.times()[:4])
        tokens = PIPELINES[name](text, tokenizer, Path(cache), num_proc)
        result = {"seconds": time.perf_counter() - start, "cpu_seconds": sum(os.times()[:4]) - cpu_start}
    print(json.dumps(result | {"tokens": tokens}))


if __name__ == "__main__":
    main()
