"""Entry point of the `minigpt` command.

This module lies outside the package because importing `minigpt_hf` imports torch and transformers, to register the Auto
classes, which takes seconds and is not needed for `minigpt --help`, `--version` and `launch`. The OpenMP library reads its
settings when torch is loaded, so they are set here, too. The other commands are in `minigpt_hf.cli`.
"""

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

# Each command is a module of the same name in `minigpt_hf/cli/`.
COMMANDS = {
    "train": "train a GPT on a text and write a model folder",
    "data": "build the questions and answers of a task, in three splits, for `minigpt train`",
    "tokenize": "tokenize a text in advance, for one or several training runs",
    "recipes": "list the recipes with model size, cost and result, or print one",
    "plot": "plot the loss curves of runs",
    "evaluate": "score a text with a causal LM: loss, perplexity, bits per byte",
    "generate": "generate text with a causal LM",
    "chat": "talk with a model in the terminal or in a browser",
    "launch": "list the files for launchers and clusters (accelerate, Slurm, Kubernetes, Ray), or print one",
    "export": "convert a model folder to the format of another program",
    "doctor": "check a model folder: completeness, consistency, pickles, secrets, loading",
    "import": "convert a nanoGPT checkpoint to a GPT-2 folder",
    "push": "upload a model folder to the Hub, with an optional demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"minigpt {version('minigpt-hf')}")
        return 0
    if argv[0] == "launch":
        return launch(argv[1:])

    set_openmp_policy()
    keep_freed_memory()
    gc.disable()  # imports create many objects, few of which become garbage: collections would take half a second
    from minigpt_hf.cli import main

    gc.freeze()
    gc.enable()
    return main(argv)


def set_openmp_policy() -> None:
    """Limit the time that OpenMP threads spin before they sleep, unless the user has chosen a policy.

    If other processes run on the same cores, spinning threads take time from the threads that they wait for.
    Subprocesses inherit the setting. It has no effect after torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # Spin iterations of GNU OpenMP; default: 300,000. Fewer than 5,000 make training slower on an idle machine.
        os.environ.setdefault("GOMP_SPINCOUNT", "8000")


def keep_freed_memory() -> None:
    """Let the allocator of glibc keep up to 512 MiB of freed memory for reuse, unless the user has set its variables.

    A training step allocates tensors of some megabytes. If they are returned to the system after each step, the page faults
    of the next step take about a tenth of its time for small models.
    """
    import ctypes

    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # e.g. musl
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the maximum
    libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)


def launch_parser() -> "argparse.ArgumentParser":
    """The arguments of `minigpt launch`."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise ValueError(message)

    summary = COMMANDS["launch"]
    parser = Parser("minigpt launch", description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
    parser.add_argument("action", choices=["list", "show"], help="list all files, or print one")
    parser.add_argument("name", nargs="?", help="name of the file, with or without its extension")
    return parser


def launch(argv: Sequence[str]) -> int:
    """Run `minigpt launch`. `list` prints the first and the last line of the comment at the start of each file."""
    files = sorted(file for file in (Path(__file__).parent / "minigpt_hf" / "launch").iterdir() if file.is_file())
    try:
        args = launch_parser().parse_args(argv)
        if args.action == "list":
            for file in files:
                lines = file.read_text(encoding="utf-8").removeprefix("#!/bin/bash\n").splitlines()
                end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
                print(f"{file.name:<28}{lines[0][2:]}\n{'':<28}{lines[end - 1][2:]}")
            return 0
        found = [file for file in files if args.name in (file.name, file.stem)]
        if not found:
            given = f"{args.name}: no such file" if args.name else "give the name of a file"
            raise ValueError(f"show {given}; available: {', '.join(file.name for file in files)}")
    except ValueError as error:
        print(f"minigpt launch: {error}", file=sys.stderr)
        return 2
    print(found[0].read_text(encoding="utf-8"), end="")
    return 0


def usage() -> str:
    """The text of `minigpt --help`."""
    lines = [f"  {command:<11} {summary}\n" for command, summary in COMMANDS.items()]
    return (
        "usage: minigpt <command> [options]      minigpt <command> --help\n\n"
        + "".join(lines)
        + "\n  --version   print the version of the package\n"
        "  --debug     after a command: show the traceback of an error\n"
    )


if __name__ == "__main__":
    sys.exit(main())
