"""How long a training takes to start at step 10 and at step 1,000,000: whole processes, and their memory."""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.process import timed

TOKENS, BLOCK_SIZE, BATCH = 10**9, 64, 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--repeats", type=int, default=3, help="starts of each kind (default: 3)")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of whole processes that start at step 10 and at step 10⁶ of a stream of 10⁹ tokens."""
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "tokens.bin").open("wb") as file:
            file.truncate(2 * TOKENS)  # sparse: it takes no room on the disk
        np.save(folder / "documents.npy", np.zeros(1, dtype=np.int64))
        about = {"dtype": "<u2", "end_of_text": 1, "characters": TOKENS, "bytes": TOKENS, "fingerprint": ""}
        (folder / "stream.json").write_text(json.dumps(about))
        starts = {0: [], 10: [], 10**6: []}
        for repeat in range(args.repeats):
            for step, done in starts.items():
                argv = [sys.executable, "-m", "benchmarks.resume", str(step), name]
                done.append(timed(argv, cwd=Path(__file__).parents[1]))
            print(f"round {repeat + 1} of {args.repeats}", file=sys.stderr)
    seconds = {step: statistics.median(each.seconds for each in done) for step, done in starts.items()}
    memory = {step: statistics.median(each.megabytes for each in done) for step, done in starts.items()}
    return {
        "seconds_at_step_10": round(seconds[10], 2),
        "seconds_at_step_1000000": round(seconds[10**6], 2),
        "ratio": round(seconds[10**6] / seconds[10], 3),
        "megabytes_above_base": round(memory[10**6] - memory[0], 1),
    }


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


if __name__ == "__main__":  # one of the processes that `run` measures
    start_at(int(sys.argv[1]), Path(sys.argv[2]))
