"""Simulate the data of a training run on many ranks, and verify that no token is lost or used twice.

    python scripts/simulate_data.py            # 512 ranks, 4 workers each, 10⁶ steps, more than 10¹² tokens: minutes, 1 GB
    python scripts/simulate_data.py --steps 1000 --ranks 16

The addresses are those of training: each rank has a `SequenceSampler`, sequences are read by `SequenceDataset` from a
`ShardedArray`. Only the shards are simulated: the tokens of a shard are computed from their positions when they are read.
The run has three phases, of which the second and third are resumed with another number of ranks: R / 2 ranks with twice the
batch; R ranks; R / 4 ranks with 4 accumulation steps. The number of sequences per step is constant.

1. *Sequences, all of them.* Every address of every rank and step is computed and marked in an array with a byte per sequence
   of the stream. As many sequences are marked as addresses were computed, so none is used twice. Those that are not marked
   are the last ones in the order of a single rank, fewer than a step, so none is lost.
2. *Tokens, by arithmetic.* Sequence i predicts the tokens offset + i · T + 1 to offset + (i + 1) · T, modulo N, where
   i < N // T: these ranges are disjoint.
3. *Bytes, a sample.* The sequences at the start of each shard, which straddle two shards or the end of the stream, the first
   and the last sequence and a random sample are read through the dataset and compared with the tokens of their positions,
   which are computed in integers of unlimited size.
4. *Iteration, a sample.* After each resume, the sampler of a rank yields the addresses that were marked, also through
   PyTorch's data loader with worker processes, which take batches in turn.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler
from minigpt_hf.data.sharded import Part, ShardedArray
from minigpt_hf.data.stream import TokenStream

BLOCK = 1 << 16  # addresses that are computed at a time
SEED, EPOCH = 0, 3


class ComputedShard:
    """A shard whose tokens are hashes of their positions in the stream.

    Args:
        start: Position of its first token.
        length: Number of its tokens.
    """

    def __init__(self, start: int, length: int):
        self.start, self.length = start, length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.length)
        return tokens_at(np.arange(self.start + start, self.start + stop, dtype=np.uint64))


def tokens_at(positions: np.ndarray) -> np.ndarray:
    """The tokens at positions of the stream: 16 bits of a product modulo 2^64."""
    return (positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48)).astype(np.uint16)


@dataclass(frozen=True)
class Phase:
    """A part of the run with a constant number of ranks.

    Args:
        begin, end: Steps of one epoch.
        ranks, batch_size, accumulation: Their product is the number of sequences per step.
    """

    begin: int
    end: int
    ranks: int
    batch_size: int
    accumulation: int

    def sampler(self, rank: int, num_sequences: int, window: int) -> SequenceSampler:
        """The sampler of a rank, as the Trainer configures it when it resumes at the first step of the phase."""
        sampler = SequenceSampler(num_sequences, SEED, window)
        sampler.set_epoch(EPOCH)
        sampler.batch_size, sampler.rank, sampler.num_ranks = self.batch_size, rank, self.ranks
        sampler.num_skipped = self.begin * self.per_step
        return sampler

    @property
    def per_step(self) -> int:
        """Sequences per rank and step."""
        return self.batch_size * self.accumulation


def phases_of(steps: int, ranks: int, batch_size: int) -> list[Phase]:
    """Three phases with the same number of sequences per step; most steps are those of the second."""
    first, second = steps // 10 | 1, steps * 9 // 10 | 1
    return [
        Phase(0, first, ranks // 2, 2 * batch_size, 1),
        Phase(first, second, ranks, batch_size, 1),
        Phase(second, steps, ranks // 4, batch_size, 4),
    ]


def stream_of(num_tokens: int, num_shards: int) -> tuple[TokenStream, list[int]]:
    """Return a stream of shards of unequal lengths, and their starts."""
    base = num_tokens // num_shards
    lengths = [base + (-1) ** i * (i % (base // 2)) for i in range(num_shards)]
    lengths[-1] += num_tokens - sum(lengths)
    starts = [0, *itertools.accumulate(lengths)]
    parts = [Part(n, partial(ComputedShard, start, n)) for start, n in zip(starts, lengths, strict=False)]
    tokens = ShardedArray(parts, np.uint16)
    return TokenStream(Path(), tokens, np.array([0]), 0, num_tokens, num_tokens, num_tokens, ""), starts[:-1]


def mark(phases: list[Phase], num_sequences: int, window: int, progress: Callable[[int], None]) -> np.ndarray:
    """Compute all addresses of all ranks. Returns whether each sequence is used, bool [num_sequences]."""
    used = np.zeros(num_sequences, bool)
    for phase in phases:
        begin, end = phase.begin * phase.per_step, phase.end * phase.per_step
        for rank in range(phase.ranks):
            sampler = phase.sampler(rank, num_sequences, window)
            assert end <= len(sampler), "the epoch ends within the run"
            for start in range(begin, end, BLOCK):
                indices = sampler.indices(start, min(start + BLOCK, end))
                used[indices] = True
                progress(len(indices))
    return used


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, verify and report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=512, help="a multiple of 4 (512)")
    parser.add_argument("--workers", type=int, default=4, help="data loader workers per rank (4)")
    parser.add_argument("--steps", type=int, default=10**6, help="optimizer steps, at least 10 (1,000,000)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences per rank and step at first (1)")
    parser.add_argument("--block_size", type=int, default=2048, help="tokens per sequence (2,048)")
    parser.add_argument("--shards", type=int, default=1000, help="shards of unequal lengths (1,000)")
    parser.add_argument("--shuffle_window", type=int, default=0, help="see `minigpt train` (0)")
    parser.add_argument("--sample", type=int, default=2000, help="random sequences to read (2,000)")
    args = parser.parse_args(argv)
    if args.ranks % 4 or args.steps < 10 or min(args.ranks, args.batch_size, args.workers) < 1:
        parser.error(
            "--ranks must be a positive multiple of 4, --steps at least 10, --batch_size and --workers positive"
        )
    return report(args)


def report(args: argparse.Namespace) -> int:
    """Run all checks and print a line for each. Returns the exit code."""
    per_step = args.ranks * args.batch_size
    num_sequences = args.steps * per_step + per_step // 2 + 7  # the epoch ends with an incomplete step
    num_tokens = num_sequences * args.block_size + args.block_size // 3
    if num_tokens // args.shards < 2 * args.block_size:
        print(f"--shards {args.shards}: shorter than two sequences; give fewer", file=sys.stderr)
        return 2
    stream, starts = stream_of(num_tokens, args.shards)
    dataset = SequenceDataset(stream, args.block_size, SEED)
    phases = phases_of(args.steps, args.ranks, args.batch_size)
    print(
        f"{num_tokens:,} tokens in {args.shards:,} shards, {num_sequences:,} sequences of {args.block_size:,} tokens; "
        f"{args.steps:,} steps of {per_step:,} sequences, epoch {EPOCH}"
    )
    for phase in phases:
        print(
            f"steps {phase.begin:,} to {phase.end:,}: {phase.ranks:,} ranks × {args.workers} workers, batches of "
            f"{phase.batch_size}, accumulation {phase.accumulation}"
        )
    began, total = time.process_time(), args.steps * per_step
    used = mark(phases, num_sequences, args.shuffle_window, progress_to(total))
    once = int(np.count_nonzero(used))
    rest = SequenceSampler(num_sequences, SEED, args.shuffle_window)
    rest.set_epoch(EPOCH)
    last = np.sort(rest.indices(total, num_sequences))
    checks = {
        f"all {total:,} addresses: {once:,} sequences are used, each of them once": once == total,
        f"the {len(last):,} sequences that are not used are those of the incomplete step at the end": (
            np.array_equal(np.flatnonzero(~used), last)
        ),
    }
    del used
    checks |= token_checks(dataset, starts, args)
    checks |= iteration_checks(dataset, phases, args)
    for name, passed in checks.items():
        print(f"{'verified' if passed else 'FAILED  '}  {name}")
    print(f"{time.process_time() - began:,.0f} s of processor time")
    return 0 if all(checks.values()) else 1


def token_checks(dataset: SequenceDataset, starts: list[int], args: argparse.Namespace) -> dict[str, bool]:
    """Compare sequences with the tokens at their positions, and the arithmetic of the positions."""
    size, length, offset = dataset.tokens_per_epoch, args.block_size, dataset.epoch_offset(EPOCH)
    number = len(dataset)
    straddling = [(start - offset) % size // length for start in starts]
    rng = random.Random(SEED)
    sample = [0, number - 1, *(rng.randrange(number) for _ in range(args.sample))]
    straddling = [index for index in straddling if index < number]

    def is_exact(index: int) -> bool:
        sequence = dataset[EPOCH, index]
        start = offset + index * length
        positions = [(start + t) % size for t in (0, length)]
        expected = tokens_at((np.arange(length + 1, dtype=np.uint64) + np.uint64(start)) % np.uint64(size))
        ends = [sequence["input_ids"][0], sequence["shift_labels"][-1]]
        hashed = [position * 0x9E3779B97F4A7C15 % 2**64 >> 48 for position in positions]  # integers of unlimited size
        return (
            ends == hashed
            and np.array_equal(sequence["input_ids"], expected[:-1])
            and np.array_equal(sequence["shift_labels"], expected[1:])
        )

    tail = size - number * length
    return {
        f"by arithmetic: the labels of {number:,} sequences are disjoint, and {tail:,} of {size:,} tokens are omitted": (
            0 <= tail < length and 0 <= offset < size and number == size // length
        ),
        f"read {len(straddling):,} sequences at the starts of all shards": all(map(is_exact, straddling)),
        f"read a sample of {len(sample):,} sequences": all(map(is_exact, sample)),
    }


def iteration_checks(dataset: SequenceDataset, phases: list[Phase], args: argparse.Namespace) -> dict[str, bool]:
    """Iterate over the first steps after each resume, also through a data loader with workers."""
    rng, same, workers_same, compared = random.Random(SEED), True, True, 0
    for phase in phases:
        steps = min(8, phase.end - phase.begin)
        begin = phase.begin * phase.per_step
        for rank in {0, phase.ranks - 1, rng.randrange(phase.ranks)}:
            counted = phase.sampler(rank, len(dataset), args.shuffle_window)
            expected = counted.indices(begin, begin + steps * phase.per_step).tolist()
            same &= [index for _, index in itertools.islice(counted, len(expected))] == expected
            compared += len(expected)
        sampler = phase.sampler(0, len(dataset), args.shuffle_window)
        loader = DataLoader(
            dataset,
            phase.batch_size,
            sampler=itertools.islice(sampler, steps * phase.per_step),
            num_workers=args.workers,
            collate_fn=dataset.collate,
            multiprocessing_context="fork",
        )
        read = [row.tolist() for batch in loader for row in batch["input_ids"]]
        indices = sampler.indices(begin, begin + steps * phase.per_step).tolist()
        workers_same &= read == [dataset[EPOCH, index]["input_ids"].tolist() for index in indices]
    return {
        f"iterated over {compared:,} addresses after resuming at steps {', '.join(f'{p.begin:,}' for p in phases)}": same,
        f"the batches of {args.workers} worker processes of rank 0 after each resume": workers_same,
    }


def progress_to(total: int) -> Callable[[int], None]:
    """Return a function that is called with numbers of addresses, and prints the remaining time every 10 seconds."""
    done, began, printed = 0, time.perf_counter(), time.perf_counter()

    def progress(number: int) -> None:
        nonlocal done, printed
        done += number
        now = time.perf_counter()
        if now - printed >= 10:
            printed = now
            left = (now - began) * (total - done) / done
            print(f"{done / total:.0%} of {total:,} addresses, {left:.0f} s left", file=sys.stderr, flush=True)

    return progress


if __name__ == "__main__":
    sys.exit(main())
