"""Training throughput in tokens/s: the bare loop, the Trainer with our data and callbacks, and optionally nanoGPT.

All candidates run in one process and alternate, several steps at a time, so that other load on the machine affects them
equally. Steps are timed by hooks on every optimizer, so that nanoGPT's `train.py` runs unmodified (from a copy of the
clone). Multi-token prediction is disabled, and warmup steps are excluded. The column `optimizer` is the share of a step
spent in the optimizer.
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

WARMUP = 10  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data", type=Path, required=True, help="training text, e.g. tinyshakespeare.txt")
    parser.add_argument("--nanogpt", type=Path, help="clone of karpathy/nanoGPT (default: not measured)")
    parser.add_argument(
        "--recipe",
        default="shakespeare-char",
        help="(default: shakespeare-char, which has the size of nanoGPT's CPU example)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=12, help="sequences per step (default: 12, as in nanoGPT's CPU example)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps per round (default: 60)")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: 7)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate the candidates and compare the time per step."""
    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.training.recipe import read_recipe

    quiet()
    recipe = read_recipe(args.recipe)
    tokens = args.batch_size * recipe["block_size"]
    with tempfile.TemporaryDirectory() as folder:
        candidates = make_candidates(args, Path(folder))
        timers: dict[str, list[StepTimer]] = {name: [] for name in candidates}
        for number in range(args.rounds):
            for name, train in candidates.items():
                with time_optimizer_steps() as timer, redirect_stdout(StringIO()):
                    train(args.steps + WARMUP)
                timers[name].append(timer)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    rows = []
    for name, rounds in timers.items():
        row = {"training": name, "milliseconds": round(1000 * statistics.median(timer.seconds for timer in rounds), 2)}
        row["tokens_per_second"] = round(tokens / statistics.median(timer.seconds for timer in rounds))
        row["cpu_milliseconds"] = round(1000 * statistics.median(timer.cpu_seconds for timer in rounds), 2)
        row["optimizer"] = f"{statistics.median(timer.optimizer_share for timer in rounds):.1%}"
        rows.append(row)

    def ratio(first: str, second: str) -> dict[str, Any]:
        pairs = list(zip(timers[first], timers[second], strict=True))
        wall_time = statistics.median(a.seconds / b.seconds for a, b in pairs)
        cpu_time = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
        return {
            "time_per_step": f"{first} / {second}",
            "wall_time": round(wall_time, 3),
            "cpu_time": round(cpu_time, 3),
        }

    pairs = [("Trainer, Muon", "bare loop, Muon"), ("Trainer, AdamW", "bare loop, AdamW")]
    pairs += [("nanoGPT", "Trainer, AdamW"), ("nanoGPT", "Trainer, Muon")] if "nanoGPT" in timers else []
    return {"tokens_per_step": tokens, "steps": rows, "ratios": [ratio(*pair) for pair in pairs]}


class StepTimer:
    """Start and end of each optimizer step.

    `starts` holds wall times, `ends` pairs of wall time and CPU time, in seconds.
    """

    def __init__(self):
        self.starts: list[float] = []
        self.ends: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        """Mean wall time between the ends of two optimizer steps, including data loading, callbacks and logging."""
        return (self.ends[-1][0] - self.ends[WARMUP - 1][0]) / (len(self.ends) - WARMUP)

    @property
    def cpu_seconds(self) -> float:
        """Mean CPU time of the same interval."""
        return (self.ends[-1][1] - self.ends[WARMUP - 1][1]) / (len(self.ends) - WARMUP)

    @property
    def optimizer_share(self) -> float:
        """Share of a step spent in the optimizer."""
        durations = [end - start for start, (end, _) in zip(self.starts, self.ends, strict=True)]
        return statistics.mean(durations[WARMUP:]) / self.seconds


@contextmanager
def time_optimizer_steps() -> Iterator[StepTimer]:
    """Time every step of every optimizer in this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    timer = StepTimer()
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: timer.starts.append(time.perf_counter())),
        register_optimizer_step_post_hook(lambda *_: timer.ends.append((time.perf_counter(), time.process_time()))),
    ]
    try:
        yield timer
    finally:
        for hook in hooks:
            hook.remove()


def make_candidates(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[int], None]]:
    """Return, by name, functions that train for a given number of steps."""
    import bare_loop

    from minigpt_hf.training.recipe import parse_arguments
    from minigpt_hf.training.train import train

    flags = ["--data", str(args.data.resolve()), "--cache_dir", str(folder / "cache"), "--use_cpu", "--fresh"]
    flags += ["--per_device_train_batch_size", str(args.batch_size), "--mtp_loss_weight", "0"]
    flags += ["--gradient_accumulation_steps", "1"]
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

    def candidate(loop: Callable, optimizer: str) -> Callable[[int], None]:
        def train_steps(steps: int) -> None:
            output_dir = folder / "run"
            shutil.rmtree(output_dir, ignore_errors=True)
            run_flags = ["--output_dir", str(output_dir), "--max_steps", str(steps), "--muon", str(optimizer == "Muon")]
            loop(parse_arguments([*flags, *run_flags], args.recipe))

        return train_steps

    loops = {"bare loop": bare_loop.train, "Trainer": train}
    candidates = {
        f"{name}, {optimizer}": candidate(loop, optimizer)
        for optimizer in ("Muon", "AdamW")
        for name, loop in loops.items()
    }
    if args.nanogpt:
        clone = folder / "nanoGPT"
        nanogpt.copy(args.nanogpt, args.data, clone)
        run_script(clone / nanogpt.DATA / "prepare.py")
        overrides = ["--eval_iters=1", "--eval_interval=1000000", f"--out_dir={folder / 'out'}"]
        candidates["nanoGPT"] = lambda steps: run_script(
            clone / "train.py", *nanogpt.CPU_EXAMPLE, *overrides, f"--max_iters={steps - 1}"
        )
    return candidates


def run_script(file: Path, *argv: str) -> None:
    """Run a Python script in its own folder, but in this process, without its output."""
    saved = sys.argv, sys.path
    sys.argv, sys.path = [str(file), *argv], [str(file.parent), *sys.path]
    try:
        with chdir(file.parent), redirect_stdout(StringIO()):
            runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv, sys.path = saved
