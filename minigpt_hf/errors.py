"""Exceptions that a user can act on, and the check of the types of arguments.

The command line reports these, and errors of the operating system, in one line; `exit_code` is what it returns. Any other
exception is a bug and keeps its traceback.
"""

import os
import reprlib
import signal
from typing import Any


class MiniGPTError(ValueError):
    """Invalid input. The message says what was given, why it is invalid, and what to do.

    Attributes:
        exit_code: What the command line returns.
        was_reported: Whether rank 0 has already logged the message for all ranks.
    """

    exit_code = 2
    was_reported = False


class UnreadableFileError(MiniGPTError):
    """A file is damaged, is not text, or is not a table of the expected format. The message names it."""


class TrainingStopped(MiniGPTError):
    """Training ended early. Checkpoints are intact; the message says how to resume."""

    exit_code = 1


class TrainingInterrupted(TrainingStopped):
    """A signal ended training. `exit_code` is 128 + its number, as in shells; after SIGUSR1, EX_TEMPFAIL of sysexits.h: a
    scheduler announced the end of the job, which it should start again."""

    def __init__(self, number: int, what: str):
        name = signal.Signals(number).name
        self.exit_code = 75 if name == "SIGUSR1" else 128 + number
        super().__init__(f"stopped by {name} {what}")


class NotSavedError(MiniGPTError):
    """Results of an evaluation do not fit on the disk of the model folder. `exit_code` is ENOSPC.

    Attributes:
        results: What the function would have returned.
    """

    exit_code = 28

    def __init__(self, message: str, results: Any):
        self.results = results
        super().__init__(message)


class DiskFullError(TrainingStopped):
    """There is no space for the next checkpoint, or for a shard of the text. `exit_code` is ENOSPC."""

    exit_code = 28


class NonFiniteLossError(TrainingStopped):
    """A loss, gradient or weight is not finite, or the loss has exploded. `exit_code` is EX_DATAERR of sysexits.h."""

    exit_code = 65


class UntrainedModelError(TrainingStopped):
    """Most optimizer steps were skipped, so no model is published. `exit_code` is EX_DATAERR of sysexits.h."""

    exit_code = 65


class StorageError(TrainingStopped):
    """The run folder was removed, replaced or read-only, or its device fails. `exit_code` is EX_IOERR of sysexits.h."""

    exit_code = 74


def check_type(name: str, value: Any, *types: type) -> None:
    """Check the type of an argument. A bool is not accepted as a number.

    Raises:
        MiniGPTError: if it has another type.
    """
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join({os.PathLike: "path", type(None): "None"}.get(kind, kind.__name__) for kind in types)
        raise MiniGPTError(f"{name} is {reprlib.repr(value)}: expected {names}")
