"""What the commands share: a parser that raises `MiniGPTError`, SIGTERM as an exception, and settings of library output."""

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from minigpt_cli import COMMANDS

from ..errors import MiniGPTError


class Parser(argparse.ArgumentParser):
    """The parser of one command. It accepts no abbreviations and raises `MiniGPTError` for invalid arguments."""

    def __init__(self, command: str, **kwargs):
        super().__init__(prog=f"minigpt {command}", description=COMMANDS[command], allow_abbrev=False, **kwargs)

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
