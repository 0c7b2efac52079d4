"""Tokens per second of training steps: the bare loop, the Trainer with our data and callbacks, and peers.

All train in one process, by turns, a burst of steps each, so that other work on the machine bends all alike. One clock
for all: a hook on every optimizer's step. So nanoGPT's `train.py` runs unmodified, too (in a copy of the clone that you
name). The first steps of a burst are left out. `optimizer` is the share of a step that the optimizer takes.
"""

import argparse
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import nanogpt

WARM_UP = 10  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--data", type=Path, required=True, help="the text, e.g. tinyshakespeare.txt")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT (default: it is left out)")
    parser.add_argument("--recipe", default="shakespeare-char", help="(default: shakespeare-char, nanoGPT's size)")
    parser.add_argument("--steps", type=int, default=60, help="in a burst (default: 60)")
    parser.add_argument("--rounds", type=int, default=7, help="bursts of each (default: 7)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Let all train in turn, and compare seconds of a step."""
    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.training.recipe import read_recipe

    quiet()
    recipe = read_recipe(args.recipe)
    tokens = recipe["per_device_train_batch_size"] * recipe["block_size"]
    with tempfile.TemporaryDirectory() as folder:
        bursts = contestants(args, Path(folder))
        clocks: dict[str, list[Clock]] = {name: [] for name in bursts}
        for number in range(args.rounds):
            for name, burst in bursts.items():
                with listening() as clock, redirect_stdout(StringIO()):
                    burst(args.steps + WARM_UP)
                clocks[name].append(clock)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    rows = []
    for name, seen in clocks.items():
        row = {"training": name, "milliseconds": round(1000 * statistics.median(each.seconds for each in seen), 2)}
        row["tokens_per_second"] = round(tokens / statistics.median(each.seconds for each in seen))
        row["cpu_milliseconds"] = round(1000 * statistics.median(each.cpu_seconds for each in seen), 2)
        row["optimizer"] = f"{statistics.median(each.optimizer_share for each in seen):.1%}"
        rows.append(row)

    def ratio(one: str, other: str) -> dict[str, Any]:
        pairs = list(zip(clocks[one], clocks[other], strict=True))
        by_clock = statistics.median(a.seconds / b.seconds for a, b in pairs)
        by_cpu = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
        return {
            "seconds_of_a_step": f"{one} / {other}",
            "by_clock": round(by_clock, 3),
            "by_processor": round(by_cpu, 3),
        }

    pairs = [("Trainer, Muon", "bare loop, Muon"), ("Trainer, AdamW", "bare loop, AdamW")]
    pairs += [("nanoGPT", "Trainer, AdamW"), ("nanoGPT", "Trainer, Muon")] if "nanoGPT" in clocks else []
    return {"tokens_in_a_step": tokens, "steps": rows, "ratios": [ratio(*pair) for pair in pairs]}


class Clock:
    """What the hooks saw: when each optimizer step began and ended, by the clock and by the processor."""

    def __init__(self):
        self.began: list[float] = []
        self.ended: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Mean of a step, from the end of one to the end of the next: data, callbacks and logging are in it."""
        return (self.ended[-1][0] - self.ended[WARM_UP - 1][0]) / (len(self.ended) - WARM_UP)

    @property
    def cpu_seconds(self) -> float:
        """The same without the time in which other programs had the core."""
        return (self.ended[-1][1] - self.ended[WARM_UP - 1][1]) / (len(self.ended) - WARM_UP)

    @property
    def optimizer_share(self) -> float:
        """Of a step."""
        inside = [end - begin for begin, (end, _) in zip(self.began, self.ended, strict=True)]
        return statistics.mean(inside[WARM_UP:]) / self.seconds


@contextmanager
def listening() -> Iterator[Clock]:
    """Time every step of every optimizer in this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    clock = Clock()
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: clock.began.append(time.perf_counter())),
        register_optimizer_step_post_hook(lambda *_: clock.ended.append((time.perf_counter(), time.process_time()))),
    ]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def contestants(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[int], None]]:
    """Name -> what trains for so many steps."""
    import bare_loop

    from minigpt_hf.run import train
    from minigpt_hf.training.recipe import parse_arguments

    flags = ["--data", str(args.data.resolve()), "--cache_dir", str(folder / "cache"), "--use_cpu", "--fresh"]
    flags += [
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--sample_tokens",
        "0",
        "--load_best_model_at_end",
        "no",
    ]

    def ours(loop: Callable, optimizer: str) -> Callable[[int], None]:
        def burst(steps: int) -> None:
            target = folder / "run"
            shutil.rmtree(target, ignore_errors=True)
            some = [*flags, "--output_dir", str(target), "--max_steps", str(steps), "--muon", str(optimizer == "Muon")]
            loop(parse_arguments(some, args.recipe))

        return burst

    loops = {"bare loop": bare_loop.train, "Trainer": train}
    bursts = {f"{name}, {rule}": ours(loop, rule) for rule in ("Muon", "AdamW") for name, loop in loops.items()}
    if args.nanogpt:
        clone = folder / "nanoGPT"
        nanogpt.copy(args.nanogpt, args.data, clone)
        as_a_script(clone / nanogpt.DATA / "prepare.py")
        quick = ["--eval_iters=1", "--eval_interval=1000000", f"--out_dir={folder / 'out'}"]
        bursts["nanoGPT"] = lambda steps: as_a_script(
            clone / "train.py", *nanogpt.CPU_EXAMPLE, *quick, f"--max_iters={steps - 1}"
        )
    return bursts


def as_a_script(file: Path, *argv: str) -> None:
    """`python FILE ARGV` in its folder, but in this process."""
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(file), *argv], [str(file.parent), *sys.path]
    try:
        with chdir(file.parent), redirect_stdout(StringIO()):
            runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv, sys.path = before
