"""How long saving a checkpoint blocks training, at three model sizes, on a local disk.

`MiniGPTTrainer` takes steps of 1,024 tokens with Muon and AdamW, and saves after each. A save is divided into hashing
(SHA-256 of every file), fsync of every file and folder, and the rest: writing the files (`safetensors`, `torch.save`) without
fsync. Both wall time, because fsync waits for the disk, and processor time are reported, as medians over the saves. `ratio`
is the wall time of a save divided by that of the step before it. With `--async_checkpoints`, training waits for the writing
only.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# name: vocabulary size, hidden size, layers, attention heads
SHAPES = {"1m": (2048, 128, 4, 4), "10m": (8192, 384, 4, 6), "124m": (50304, 768, 12, 12)}
BLOCK_SIZE, BATCH = 256, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="model sizes (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="saves per size (default: 5)")
    parser.add_argument("--folder", help="where to save, which determines the disk (default: the temporary folder)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the saves of each size."""
    return {"saves": [measure(name, args.repeats, args.folder) for name in args.sizes]}


def measure(name: str, repeats: int, parent: str | None) -> dict[str, Any]:
    """Train one step more than `repeats`, of which the first is not counted, and save after each."""
    import numpy as np
    import torch

    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM, atomic
    from minigpt_hf.data.blocks import SequenceDataset
    from minigpt_hf.data.stream import TokenStream
    from minigpt_hf.data.tokenizer import byte_tokenizer
    from minigpt_hf.training import checkpoint
    from minigpt_hf.training.arguments import MiniGPTTrainingArguments
    from minigpt_hf.training.trainer import MiniGPTTrainer

    vocab_size, hidden_size, layers, heads = SHAPES[name]
    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads
    )
    model = MiniGPTForCausalLM(config)
    ids = np.random.default_rng(0).integers(1, vocab_size, 100_000, dtype=np.uint16)
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        stream = TokenStream(Path(folder), ids, ids[:1], 0, len(ids), len(ids), len(ids), "")
        training = MiniGPTTrainingArguments(
            output_dir=str(Path(folder) / "run"),
            max_steps=repeats + 1,
            per_device_train_batch_size=BATCH,
            save_steps=1,
            save_total_limit=1,
            eval_strategy="no",
            load_best_model_at_end=False,
            disable_tqdm=True,
            use_cpu=True,
        )
        Path(training.output_dir).mkdir()
        dataset = SequenceDataset(stream, BLOCK_SIZE, seed=0)
        trainer = MiniGPTTrainer(model, training, dataset, None, byte_tokenizer(), [])
        with (
            clock.timing(MiniGPTTrainer, "_save_checkpoint", "save"),
            clock.timing(atomic, "sha256", "hash"),
            clock.timing(atomic, "fsync", "fsync"),
            clock.timing(checkpoint, "fsync", "fsync"),
            clock.rounds(MiniGPTTrainer, "_save_checkpoint", name, repeats),
        ):
            trainer.train()
        size = sum(file.stat().st_size for file in (Path(folder) / "run" / f"checkpoint-{repeats + 1}").iterdir())
    return row(name, model.num_parameters(), size, clock.finished[1:])


def row(name: str, parameters: int, size: int, rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Medians over rounds, each {part: (wall seconds, processor seconds)}."""

    def ms(seconds: list[float]) -> str:
        return f"{1000 * statistics.median(seconds):,.0f}"

    parts = {
        "write": [tuple(one["save"][i] - one["hash"][i] - one["fsync"][i] for i in (0, 1)) for one in rounds],
        **{part: [one[part] for one in rounds] for part in ("hash", "fsync", "save", "step")},
    }
    return {
        "": name,
        "parameters": f"{parameters:,}",
        "MB": f"{size / 1e6:,.0f}",
        **{f"{part}_ms": ms([wall for wall, _ in values]) for part, values in parts.items()},
        "ratio": f"{statistics.median(one['save'][0] / one['step'][0] for one in rounds):.2f}",
        **{f"CPU_{part}_ms": ms([cpu for _, cpu in parts[part]]) for part in ("write", "hash", "save")},
        "MB_per_s": f"{statistics.median(size / 1e6 / one['save'][0] for one in rounds):,.0f}",
    }


class Clock:
    """Adds up the wall and processor time of functions in rounds; a round is a step and its save.

    Attributes:
        finished: {part: (wall seconds, processor seconds)} of each round.
    """

    def __init__(self) -> None:
        self.finished: list[dict[str, tuple[float, float]]] = []
        self.parts: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    @contextmanager
    def timing(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Time the calls of a function within the block."""
        real = getattr(owner, name)

        def timed(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return real(*args, **kwargs)
            finally:
                before = self.parts[part]
                self.parts[part] = (before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, real)

    @contextmanager
    def rounds(self, owner: Any, name: str, label: str, repeats: int) -> Iterator[None]:
        """End a round after each call of a function; the time between two calls is the step."""
        real = getattr(owner, name)
        ended = time.perf_counter(), time.process_time()

        def last(*args, **kwargs):
            nonlocal ended
            began = time.perf_counter(), time.process_time()
            self.parts["step"] = (began[0] - ended[0], began[1] - ended[1])
            result = real(*args, **kwargs)
            self.finished.append(dict(self.parts))
            self.parts.clear()
            print(f"{label}: save {len(self.finished) - 1} of {repeats}", file=sys.stderr)
            ended = time.perf_counter(), time.process_time()
            return result

        setattr(owner, name, last)
        try:
            yield
        finally:
            setattr(owner, name, real)
