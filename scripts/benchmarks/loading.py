"""Rate at which one core loads training sequences from a sharded stream, compared with the rates that docs/scale.md requires.

The stream is in shards on the local disk and has been read before, so its bytes come from the page cache: what is measured
is the work of the data loader, not that of the storage. Three rates are measured: addresses of the sampler, as rank 0 of 512
in a stream of 10¹² tokens; sequences read by the dataset, in the order of training; batches of the data loader, collated,
without worker processes. A rate is the median over rounds of a number divided by processor time, which depends less on other
load than wall time.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TOKENS, SHARDS, RANKS, BATCH = 1 << 26, 16, 512, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=7, help="number of rounds (default: 7)")
    parser.add_argument("--sequences", type=int, default=2000, help="sequences per round (default: 2,000)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the rates, and relate them to those that a GPU requires."""
    import numpy as np
    import scale
    from torch.utils.data import DataLoader

    from minigpt_hf.data.array_file import ArrayFile
    from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler
    from minigpt_hf.data.sharded import Part, ShardedArray
    from minigpt_hf.data.stream import TokenStream

    inputs = scale.Inputs()
    with tempfile.TemporaryDirectory() as name:
        ids = np.random.default_rng(0).integers(1, 50_304, TOKENS // SHARDS, dtype=np.uint16)
        ids[:: inputs.document_tokens] = 0  # the BOS token: batches have position ids
        files = [Path(name) / f"{number}.bin" for number in range(SHARDS)]
        for file in files:
            ids.tofile(file)
        parts = [Part(len(ids), lambda file=file: ArrayFile(file, "<u2")) for file in files]
        stream = TokenStream(Path(name), ShardedArray(parts, "<u2"), ids[:1], 0, TOKENS, TOKENS, TOKENS, "")
        dataset = SequenceDataset(stream, inputs.block_size, seed=0)

        def addresses() -> None:
            sampler = SequenceSampler(inputs.tokens // inputs.block_size, seed=0)
            sampler.batch_size, sampler.num_ranks = BATCH, RANKS
            for _ in itertools.islice(sampler, 20 * args.sequences):
                pass

        def repeated() -> Iterable[tuple[int, int]]:
            return itertools.islice(itertools.cycle(SequenceSampler(len(dataset), seed=0)), args.sequences)

        def read() -> None:
            for address in repeated():
                dataset[address]

        def load() -> None:
            for _ in DataLoader(dataset, BATCH, sampler=repeated(), collate_fn=dataset.collate):
                pass

        parts_of_work: dict[str, tuple[Callable[[], None], int]] = {
            "addresses": (addresses, 20 * args.sequences),
            "sequences read": (read, args.sequences),
            "sequences in batches": (load, args.sequences),
        }
        rates: dict[str, list[float]] = {part: [] for part in parts_of_work}
        for repeat in range(args.repeats + 1):
            for part, (function, number) in parts_of_work.items():
                start = time.process_time()
                function()
                if repeat:  # the first round fills the page cache
                    rates[part].append(number / (time.process_time() - start))
            print(f"round {repeat} of {args.repeats}", file=sys.stderr)
    medians = {part: statistics.median(values) for part, values in rates.items()}
    measured = [
        {
            "one_core": part,
            "per_second": f"{medians[part]:,.0f}",
            "slowest_round": f"{min(values):,.0f}",
            "tokens_per_second": f"{medians[part] * inputs.block_size / 1e6:,.0f} M",
        }
        for part, values in rates.items()
    ]
    required = [
        {
            "model": name,
            "required_per_GPU": f"{(rate := scale.required_rate(name, inputs)):,.2f}",
            "measured_per_core": f"{medians['sequences in batches']:,.0f}",
            "share_of_a_core": f"{rate / medians['sequences in batches']:.2%}",
        }
        for name in scale.SHAPES
    ]
    return {"block_size": inputs.block_size, "gpus": inputs.gpus, "rates": measured, "sequences_per_second": required}
