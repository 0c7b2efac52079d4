"""Time to the first step and peak memory of processes that resume at step 10 and at step 1,000,000,000."""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.process import timed

TOKENS, BLOCK_SIZE, BATCH, LAST = 10**12, 64, 12, 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=3, help="starts per step (default: 3)")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Measure processes that resume in a stream of 10¹² tokens; step 0 stands for the imports alone."""
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "tokens.bin").open("wb") as file:
            file.truncate(2 * TOKENS)  # a sparse file: occupies no disk space
        np.save(folder / "documents.npy", np.zeros(1, dtype=np.int64))
        metadata = {"dtype": "<u2", "end_of_text": 0, "tokens": TOKENS, "documents": 1, "fingerprint": ""}
        metadata |= {"characters": TOKENS, "bytes": TOKENS}
        (folder / "stream.json").write_text(json.dumps(metadata))
        starts = {0: [], 10: [], LAST: []}
        for repeat in range(args.repeats):
            for step, processes in starts.items():
                argv = [sys.executable, "-m", "benchmarks.resume", str(step), name]
                processes.append(timed(argv, cwd=Path(__file__).parents[1]))
            print(f"round {repeat + 1} of {args.repeats}", file=sys.stderr)
    seconds = {step: statistics.median(process.seconds for process in starts[step]) for step in starts}
    memory = {step: statistics.median(process.megabytes for process in starts[step]) for step in starts}
    return {
        "seconds_at_step_10": round(seconds[10], 2),
        "seconds_at_step_1000000000": round(seconds[LAST], 2),
        "ratio": round(seconds[LAST] / seconds[10], 3),
        "megabytes_above_base": round(memory[LAST] - memory[0], 1),
    }


def resume_at(step: int, folder: Path) -> None:
    """Do what resuming does before its first step: open the stream, and load the next batch."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    import minigpt_hf  # noqa: F401 (part of the start-up time)
    from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler
    from minigpt_hf.data.stream import TokenStream

    if step:
        dataset = SequenceDataset(TokenStream.open(folder), BLOCK_SIZE, seed=0)
        sampler = SequenceSampler(len(dataset), seed=0)
        sampler.num_skipped = step * BATCH
        loader = Accelerator(cpu=True).prepare(DataLoader(dataset, BATCH, sampler=sampler, collate_fn=dataset.collate))
        assert next(iter(loader))["input_ids"].shape == (BATCH, BLOCK_SIZE)


if __name__ == "__main__":  # started by `run`
    resume_at(int(sys.argv[1]), Path(sys.argv[2]))
