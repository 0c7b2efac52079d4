"""Time and memory to find verbatim copies in token streams of increasing length.

Six held-out excerpts of 500 tokens, as many as three samples and their baseline, are compared with the training split of
the standard library, repeated to the given lengths, in tokens of one byte and of byte-level BPE. Each case is a process that
reads the stream from a file. `peak MB` is the memory of this process, most of which the imports use.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZERS = ("bytes", "bpe")
EXCERPTS, EXCERPT_TOKENS = 6, 500
VOCAB_SIZE = 8192
WRITTEN_TOKENS = 1 << 24  # tokens that are written at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[10**7, 10**8], help="lengths of the stream (default: 10^7 and 10^8)"
    )
    parser.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS, help="default: both")
    parser.add_argument("--data", default="stdlib", help="text (default: the standard library)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each tokenizer and length."""
    from benchmarks.process import timed

    rows = []
    for tokenizer in args.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            stream, excerpts = encode(args.data, tokenizer)
            np.savez(Path(folder) / "excerpts.npz", *excerpts)
            for tokens in args.tokens:
                write_repeated(stream, tokens, Path(folder) / "tokens.bin")
                process = timed([sys.executable, __file__, folder], PYTHONPATH=":".join(sys.path))
                rows.append(
                    {"tokenizer": tokenizer, "tokens": f"{tokens:,}", **json.loads(process.output.splitlines()[-1])}
                )
    return {"task": f"{EXCERPTS} excerpts of {EXCERPT_TOKENS} tokens, one thread", "copying": rows}


def encode(data: str, tokenizer: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the tokens of the training split, uint16, and excerpts of the validation split."""
    from minigpt_hf.data.corpus import CACHE, load_corpus
    from minigpt_hf.data.prepared import prepare
    from minigpt_hf.inference.copying import held_out_excerpts

    text = prepare(load_corpus(data), tokenizer, VOCAB_SIZE, CACHE, block_size=256, validation_characters=10**6)
    assert text.validation is not None
    return text.train.tokens[:], held_out_excerpts(text.validation, [EXCERPT_TOKENS] * EXCERPTS)


def write_repeated(stream: np.ndarray, tokens: int, file: Path) -> None:
    """Write a stream, repeated to a number of tokens."""
    with file.open("wb") as out:
        missing = tokens
        while missing > 0:
            part = stream[: min(missing, WRITTEN_TOKENS)]
            out.write(part.tobytes())
            missing -= len(part)


def search(folder: Path) -> dict[str, Any]:
    """Search the stream in a folder; return the measurements."""
    from minigpt_hf.data.matching import find_matches
    from minigpt_hf.data.stream import ArrayFile

    tokens = ArrayFile(folder / "tokens.bin", "<u2")
    with np.load(folder / "excerpts.npz") as arrays:
        excerpts = list(arrays.values())
    wall, cpu = time.perf_counter(), time.process_time()
    matches = find_matches(tokens, excerpts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    covered = sum(match.covered(16).sum() for match in matches)
    return {
        "seconds": round(wall, 2),
        "CPU seconds": round(cpu, 2),
        "million tokens/s of CPU": round(len(tokens) / cpu / 1e6, 1),
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "longest": max(match.longest for match in matches),
        "in 16 or more": f"{covered / sum((excerpt >= 0).sum() for excerpt in excerpts):.1%}",
    }


if __name__ == "__main__":
    print(json.dumps(search(Path(sys.argv[1]))))
