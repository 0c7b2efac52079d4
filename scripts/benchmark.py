"""Run a benchmark and report its results as tables or JSON.

    python scripts/benchmark.py resume             time to the first step when resuming at step 10 and at step 1,000,000,000
    python scripts/benchmark.py <name> --help      options of a benchmark; the names are listed in `BENCHMARKS`

Each benchmark is a module of `benchmarks/` with `add_arguments(parser)` and `run(args) -> dict`. The candidates
alternate for several rounds, medians are reported, and the number of threads is fixed. Ratios are taken within a round,
because other load on the machine changes absolute times. Results are printed with the machine, the commit and the load
average.
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
    "resume": "time to the first step when resuming at step 10 and at step 1,000,000,000",
    "learn": "loss and training time compared with nanoGPT, or with GPT-2 and Llama in the stock Trainer",
    "throughput": "training throughput in tokens/s: bare loop, Trainer, nanoGPT",
    "data": "tokenization throughput in MB/s, compared with run_clm.py",
    "ablation": "effect of each setting of a recipe on the validation loss",
    "scaling": "validation loss against learning rate at several widths",
    "generate": "generation throughput in tokens/s, compared with Qwen3, nanoGPT's sampler and memory bandwidth",
    "busy": "training speed next to one and three busy loops per core, by OpenMP policy",
    "chat": "fine-tuning on packed conversations, compared with TRL's padded batches",
    "attention": "attention of the positional heads before and after training",
    "page": "generation throughput of the exported HTML page in headless Chromium",
    "copying": "time and memory to find verbatim copies in token streams of increasing length",
    "loading": "rate of the data loader on one core, compared with what 512 GPUs require",
    "checkpoint": "how long saving a checkpoint blocks training",
    "muon": "share of a training step spent in Muon, at the model sizes of two recipes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its results. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--threads", type=int, default=1, help="number of threads of each process (default: 1)")
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: benchmark.py <name> [options]      benchmark.py <name> --help\n")
        print(*(f"  {name:<12} {description}" for name, description in BENCHMARKS.items()), sep="\n")
        return 0 if argv in (["-h"], ["--help"]) else 2
    name, *rest = argv
    # Set before torch is imported, because torch reads them at import; subprocesses inherit them.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(common.parse_known_args(rest)[0].threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    module = import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {name}",
        parents=[common],
        allow_abbrev=False,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    load_before = os.getloadavg()[0]
    start = time.perf_counter()
    results = module.run(args)
    metadata = {
        "command": shlex.join(["python", "scripts/benchmark.py", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": current_commit(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if args.json:
        print(json.dumps({**metadata, **results}))
    else:
        print_results(metadata)
        print_results(results)
    return 0


def print_results(results: dict[str, Any]) -> None:
    """Print each value on a line, and each list of dictionaries as a table."""
    for name, value in results.items():
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


def current_commit() -> str:
    """Return the abbreviated commit hash, with a trailing "+" if the working tree has uncommitted changes."""
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    process = subprocess.run(argv, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


def processor_name() -> str:
    """Return the model name of the processor, or the machine type if it is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
