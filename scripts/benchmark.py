"""Measurements as ratios within one run, on this machine.

    python scripts/benchmark.py resume      how long a training takes to start at step 10 and at step 1,000,000

Each prints a table; `--json` prints the figures for programs. Runs alternate, and medians are taken.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS, BLOCK_SIZE, BATCH = 10**9, 64, 12


def start_at(step: int, folder: Path) -> None:
    """What a resumed training does before its first step: map the stream, pass the batches behind it, read the next."""
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader

    import minigpt_hf  # noqa: F401 (part of what a start takes)
    from minigpt_hf.data.blocks import Blocks, BlockSampler
    from minigpt_hf.data.stream import TokenStream

    if step:
        blocks = Blocks(TokenStream.open(folder), BLOCK_SIZE, seed=0)
        sampler = BlockSampler(len(blocks), seed=0)
        sampler.passed = step * BATCH
        loader = Accelerator(cpu=True).prepare(DataLoader(blocks, BATCH, sampler=sampler, collate_fn=blocks.collate))
        assert next(iter(skip_first_batches(loader, step)))["input_ids"].shape == (BATCH, BLOCK_SIZE)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resume(repeats: int) -> dict[str, float]:
    """Seconds and memory of whole processes that start at step 10 and at step 10⁶ of a stream of 10⁹ tokens."""
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "tokens.bin").open("wb") as file:
            file.truncate(2 * TOKENS)  # sparse: it takes no room on the disk
        np.save(folder / "documents.npy", np.zeros(1, dtype=np.int64))
        about = {"dtype": "<u2", "end_of_text": 1, "characters": TOKENS, "bytes": TOKENS, "fingerprint": ""}
        (folder / "stream.json").write_text(json.dumps(about))
        seconds, kilobytes = {}, {}
        for repeat in range(repeats):
            for step in (0, 10, 10**6):
                argv = [sys.executable, __file__, "start", "--step", str(step), "--folder", name]
                began = time.perf_counter()
                done = subprocess.run(argv, capture_output=True, text=True, check=True)
                seconds.setdefault(step, []).append(time.perf_counter() - began)
                kilobytes.setdefault(step, []).append(int(done.stdout))
            print(f"round {repeat + 1} of {repeats}", file=sys.stderr)
    median = {step: statistics.median(values) for step, values in seconds.items()}
    memory = {step: statistics.median(values) / 1024 for step, values in kilobytes.items()}
    return {
        "seconds_at_step_10": round(median[10], 2),
        "seconds_at_step_1000000": round(median[10**6], 2),
        "ratio": round(median[10**6] / median[10], 3),
        "megabytes_above_base": round(memory[10**6] - memory[0], 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measurements as ratios within one run, on this machine.")
    parser.add_argument("what", choices=["resume", "start"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "start":  # one of the processes that `resume` measures
        start_at(args.step, args.folder)
        sys.exit()
    figures = resume(args.repeats)
    if args.json:
        print(json.dumps(figures))
    else:
        print(f"load average {os.getloadavg()[0]:.2f}")
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):<28} {value}")
