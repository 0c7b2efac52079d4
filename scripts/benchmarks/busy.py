"""Training speed on a busy machine: the share of the quiet speed next to one and three busy loops per core.

Each candidate is an OpenMP policy, i.e. the environment of one training process (recipe `demo`). The processes stay alive
and train one after the other, several steps at a time, under each load; a round covers all loads and candidates. With S
busy loops per core, the share of a training process with one thread per core would be 1 / (1 + S) under fair scheduling.
Reports medians over the rounds. Measure on an otherwise idle machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

POLICIES = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=8000": {"GOMP_SPINCOUNT": "8000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# Ends when its parent process does.
BUSY_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
LOADS = (0, 1, 3)  # busy loops per core
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--training_threads",
        type=int,
        default=os.cpu_count(),
        help="threads of each training process (default: the number of cores); replaces --threads",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--recipe", default="demo", help="(default: demo)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every policy under every load."""
    speeds: dict[tuple[str, int], list[float]] = {(name, load): [] for name in POLICIES for load in LOADS}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(training_process(args.recipe, args.steps, args.training_threads, policy))
            for name, policy in POLICIES.items()
        }
        for number in range(args.rounds):
            for load in LOADS:
                with busy_loops(load * os.cpu_count()):
                    for name, worker in workers.items():
                        speeds[name, load].append(measure(worker))
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return {"training_threads": args.training_threads, "speed": table(speeds)}


def table(speeds: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    """One row per policy.

    Args:
        speeds: Speeds in tokens/s of each round, by policy and number of busy loops per core.
    """
    reference = next(iter(speeds))[0]
    rows = []
    for name in dict.fromkeys(name for name, _ in speeds):
        quiet = speeds[name, 0]
        row = {"policy": name, "quiet_tokens_per_second": round(statistics.median(quiet))}
        row["quiet_relative"] = round(median_ratio(quiet, speeds[reference, 0]), 3)
        for load in sorted(load for other, load in speeds if other == name and load):
            row[f"share_at_{load}_per_core"] = round(median_ratio(speeds[name, load], quiet), 3)
        rows.append(row)
    return rows


def median_ratio(values: list[float], references: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(value / reference for value, reference in zip(values, references, strict=True))


@contextmanager
def busy_loops(number: int) -> Iterator[list[subprocess.Popen]]:
    """Run processes that each occupy one core."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(number)]
    try:
        time.sleep(0.5 if processes else 0)  # until all of them have started
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def training_process(recipe: str, steps: int, threads: int, policy: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start a process that trains `steps` steps for each line on its standard input, and wait until it is ready."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.busy", recipe, str(steps)],
        cwd=Path(__file__).parents[1],
        env={**environment, "OMP_NUM_THREADS": str(threads), **policy},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        measure(process)  # warmup: lazy initialization, memory allocation
        yield process
    finally:
        process.kill()
        process.wait()


def measure(process: subprocess.Popen) -> float:
    """Let a training process train its steps. Returns the speed in tokens/s."""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def work(recipe: str, steps: int) -> None:
    """The training process: for each line of standard input, train and print the speed in tokens/s."""
    import bare_loop

    from benchmarks.trial import prepare

    trial = prepare(recipe, ["--max_steps", str(steps), "--use_cpu"])
    data, _, training = trial.arguments
    tokens = steps * training.train_batch_size * data.block_size
    for _ in sys.stdin:
        start = time.perf_counter()
        bare_loop.train_model(trial.model, trial.dataset, training)
        print(tokens / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
