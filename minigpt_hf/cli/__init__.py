"""The commands of `minigpt`, one module each.

A command NAME is an entry of `minigpt_cli.COMMANDS` and a module NAME.py in this package. Its `parser()` returns the
argument parser; its `run(argv)` executes the command and returns the exit code, or `None` for 0.
Modules import what they need inside `run`, after the arguments are parsed. Invalid input (`MiniGPTError`) and errors of the
operating system are reported in one line; any other exception keeps its traceback.
"""

import errno
import logging
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from minigpt_cli import COMMANDS

from ..atomic import DISK_FULL
from ..errors import MiniGPTError
from ..output import discard, guarded_output, open_standard_descriptors
from .parser import Terminated


def main(argv: Sequence[str]) -> int:
    """Run one command, given its name and arguments. Returns the exit code."""
    command, *rest = argv
    if command not in COMMANDS:
        print(f"minigpt: unknown command {command!r}; available: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    open_standard_descriptors()
    with guarded_output(lasting=command == "train"):
        _log_to_stderr()
        return _run(command, [flag for flag in rest if flag != "--debug"], debug)


class _StderrHandler(logging.Handler):
    """Writes to the current `sys.stderr`, because `main` may be called several times with different streams."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    """Print the log messages of the package as plain lines on standard error."""
    logger = logging.getLogger("minigpt_hf")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    if logger.level == logging.NOTSET:  # otherwise keep the level set by the user
        logger.setLevel(logging.INFO)


def _run(command: str, argv: list[str], debug: bool) -> int:
    """Run a command and report its errors. Returns the exit code."""
    try:
        code = import_module(f"{__name__}.{command}").run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"minigpt {command}: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except Terminated:
        print(f"minigpt {command}: stopped by SIGTERM; nothing was saved", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:  # e.g. `| head`; exit code of a process terminated by SIGPIPE
        discard(sys.stdout)
        return 141
    except MiniGPTError as error:
        if debug:
            raise
        if not error.was_reported:
            print_error(command, error)
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        print_error(command, error)
        # As for `DiskFullError`: a log or a sample may not fit on the disk either.
        return errno.ENOSPC if error.errno in (*DISK_FULL, errno.EFBIG) else 2
    except Exception as error:
        error.add_note("This is a bug: please report it with this traceback and the command.")
        raise
    return code or 0


def print_error(command: str, error: Exception) -> None:
    """Write an error to stderr as a single line."""
    print(f"minigpt {command}: {_printable(str(error))}", file=sys.stderr)


def _printable(message: str) -> str:
    """A message in one line, with control characters escaped: text quoted from a file must not control the terminal."""
    from ..doctor.row import is_invisible

    line = " ".join(message.split())
    return "".join(c.encode("unicode_escape").decode() if is_invisible(c) else c for c in line)
