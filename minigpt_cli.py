"""Entry point of the `minigpt` command.

This module lies outside the package because importing `minigpt_hf` imports torch and transformers, to register the Auto
classes, which takes seconds: `minigpt --help` and `--version` do without. The commands are in `minigpt_hf.cli`.
"""

import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a GPT on a text and write a model folder",
    "tokenize": "tokenize a text in advance, for one or several training runs",
    "recipes": "list the recipes with model size, cost and result, or print one",
    "plot": "plot the loss curves of runs",
    "evaluate": "score a text with a causal LM: loss, perplexity, bits per byte",
    "generate": "generate text with a causal LM",
    "export": "convert a model folder for other programs: native Qwen3, GGUF, ONNX",
    "doctor": "check a model folder: completeness, consistency, pickles, secrets, loading",
    "import": "convert a nanoGPT checkpoint to a GPT-2 folder",
    "push": "upload a model folder to the Hub in one commit",
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

    from minigpt_hf.cli import main

    return main(argv)


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
