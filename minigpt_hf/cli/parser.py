"""Shared by the commands: a parser that raises `MiniGPTError`, the options of generation, SIGTERM as an exception, and the
verbosity of libraries.
"""

import argparse
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minigpt_cli import COMMANDS

from ..errors import MiniGPTError

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Parser(argparse.ArgumentParser):
    """The parser of one command. It accepts no abbreviations and raises `MiniGPTError` for invalid arguments."""

    def __init__(self, command: str, **kwargs):
        description = COMMANDS[command.partition(" ")[0]]
        super().__init__(prog=f"minigpt {command}", description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise MiniGPTError(message)


class Terminated(BaseException):
    """SIGTERM was received. A `BaseException`, so that no error handler catches it and every cleanup runs."""


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` on the first SIGTERM; a second one ends the process immediately."""

    def terminate(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet() -> None:
    """Disable the progress bars of datasets and transformers, and the retry warnings of huggingface_hub."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    huggingface_hub.utils.logging.set_verbosity_error()  # a final failure is raised as an error
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def generation_options(flags: list[str]) -> dict[str, Any]:
    """["--top_k", "50", "--do_sample", "false"] -> {"top_k": 50, "do_sample": False}.

    Raises:
        MiniGPTError: if a flag is not of this form, or a count is not a positive integer.
    """
    from ..training.recipe import load_yaml

    options: dict[str, Any] = {}
    while flags:
        flag, *flags = flags
        if not flag.startswith("--"):
            raise MiniGPTError(f"unexpected argument {flag!r}; options look like --top_k 50")
        name, is_joined, value = flag[2:].partition("=")
        if not is_joined:
            value, flags = (flags[0], flags[1:]) if flags and not flags[0].startswith("--") else ("true", flags)
        name = name.replace("-", "_")
        if name == "stop_strings" and not value.startswith("["):
            options[name] = value  # not YAML, in which "no" and "123" are not strings
            continue
        try:
            # YAML parses 1e-3 as a string.
            options[name] = float(value) if SCIENTIFIC.fullmatch(value) else load_yaml(value)
        except ValueError as error:
            raise MiniGPTError(f"--{name} {value}: invalid value: {error}") from error
    for name in ("max_new_tokens", "max_length", "max_cache_len", "num_return_sequences", "num_beams"):
        if name in options and (type(options[name]) is not int or options[name] < 1):
            raise MiniGPTError(f"--{name} {options[name]}: must be an integer of at least 1")
    return options
