"""`minigpt <verb>`: the package on the command line.

Each verb is a file of its own in this folder, a thin skin over one stage: `parser()` says what it takes and `run(argv)` does
it. Nothing is imported before it is needed, so `--help` answers at once. What a user can put right is told in one line with
exit code 2; `--debug` shows where it came from.
"""

import errno
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import MiniGPTError
from ..output import discard, guarded_output, open_standard_descriptors

VERBS = {
    "train": "train a GPT from scratch on a text, and write a model folder",
    "tokenize": "prepare a text ahead of time, for one machine or several",
    "recipes": "list the recipes with their size, cost and result, or show one",
    "plot": "draw how runs learnt, in one picture",
    "evaluate": "score a text with any causal LM: loss, perplexity, bits per byte",
    "generate": "write text with any causal LM",
    "export": "the same model for other programs: native Qwen3, GGUF, ONNX",
    "doctor": "check a model folder: complete, consistent, free of pickles and secrets, and loadable",
    "import": "turn nanoGPT's ckpt.pt into a GPT-2 folder",
    "push": "publish a model folder on the Hub, in one commit",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(f"minigpt {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"minigpt: unknown verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    open_standard_descriptors()
    with guarded_output(lasting=verb == "train"):
        _log_to_stderr()
        return _in_one_line(verb, [flag for flag in rest if flag != "--debug"], debug)


def usage() -> str:
    """What `minigpt --help` prints: a line for each verb."""
    lines = [f"  {verb:<11} {summary}\n" for verb, summary in VERBS.items()]
    return (
        "usage: minigpt <verb> [options]      minigpt <verb> --help\n\n"
        + "".join(lines)
        + "\n  --version   the version of this package\n"
        "  --debug     after a verb: show the traceback of an error\n"
    )


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time of a record: `main` may be called repeatedly, with different streams."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    """Show what the package logs (choices made, files skipped, warnings) as plain lines on standard error."""
    logger = logging.getLogger("minigpt_hf")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    if logger.level == logging.NOTSET:  # a level set by the user stays
        logger.setLevel(logging.INFO)


def _in_one_line(verb: str, argv: list[str], debug: bool) -> int:
    """Run a verb and return its exit code; tell an error that a user can put right in one line."""
    try:
        code = import_module(f"{__name__}.{verb}").run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"minigpt {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has what it wanted; the code is that of a program that SIGPIPE ended
        discard(sys.stdout)
        return 141
    except (MiniGPTError, OSError) as error:
        if debug:
            raise
        if not getattr(error, "was_reported", False):
            print(f"minigpt {verb}: {_printable(str(error))}", file=sys.stderr)
        if isinstance(error, OSError):
            return errno.ENOSPC if error.errno == errno.ENOSPC else 2  # as `DiskFullError`: the log needs space, too
        return error.exit_code
    except Exception as error:
        error.add_note("This is a bug: please report it with this traceback and the command.")
        raise
    return code or 0


def _printable(message: str) -> str:
    """A message in one line, with control characters as escapes: what it quotes of a file must not act on the terminal."""
    from ..doctor.row import is_invisible

    line = " ".join(message.split())
    return "".join(c.encode("unicode_escape").decode() if is_invisible(c) else c for c in line)
