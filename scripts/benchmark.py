"""Measurements as ratios within one run, on this machine.

    python scripts/benchmark.py resume             how long a training takes to start at step 10 and at step 1,000,000
    python scripts/benchmark.py <what> --help      every other row of `BENCHMARKS`

Each is a file of `benchmarks/` with `add_arguments(parser)` and `run(args) -> dict`. What is compared alternates and is
repeated, medians are taken, and threads are pinned. Out: tables (lists of rows in the dictionary) and figures, or JSON
with `--json`, both with the machine, the commit and the load average, since other work on a machine bends seconds.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

BENCHMARKS = {
    "resume": "how long a training takes to start at step 10 and at step 1,000,000",
    "learn": "loss and seconds beside nanoGPT, or beside GPT-2 and Llama with the stock Trainer",
    "throughput": "tokens per second of training steps: bare loop, Trainer, nanoGPT",
    "data": "megabytes of text per second into tokens on disk, our way and that of run_clm.py",
    "ablation": "what each part of a recipe gives",
    "scaling": "whether the learning rates are right at other widths",
    "generate": "tokens a second when writing, beside Qwen3, nanoGPT's sampler and the limit of the memory",
    "muon": "what share of a step Muon takes, in two recipes' shapes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print what it found."""
    argv = list(sys.argv[1:] if argv is None else argv)
    every = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    every.add_argument("--json", action="store_true", help="print JSON")
    every.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: benchmark.py <what> [options]      benchmark.py <what> --help\n")
        print(*(f"  {name:<12} {what}" for name, what in BENCHMARKS.items()), sep="\n")
        return 0 if argv in (["-h"], ["--help"]) else 2
    what, *rest = argv
    # Before torch is imported, here and in every process that is started: it reads them once.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(every.parse_known_args(rest)[0].threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    module = import_module(f"benchmarks.{what}")
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {what}",
        parents=[every],
        allow_abbrev=False,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    load_before = os.getloadavg()[0]
    began = time.perf_counter()
    figures = module.run(args)
    about = {
        "command": shlex.join(["python", "scripts/benchmark.py", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.perf_counter() - began, 1),
    }
    if args.json:
        print(json.dumps({**about, **figures}))
    else:
        show(about)
        show(figures)
    return 0


def show(figures: dict[str, Any]) -> None:
    """Print figures a line each, and each list of rows as a table."""
    for name, value in figures.items():
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            print(f"{name.replace('_', ' '):<32} {' to '.join(map(str, value)) if isinstance(value, list) else value}")
            continue
        rows = [list(value[0])] + [["" if cell is None else str(cell) for cell in row.values()] for row in value]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"\n{name.replace('_', ' ')}")
        for row in rows:
            first, *others = (cell.replace("_", " ") for cell in row) if row is rows[0] else row
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            print("  " + "  ".join([first.ljust(widths[0]), *cells]))
        print()


def commit() -> str:
    """The commit that is measured, with a + if files differ from it."""
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
