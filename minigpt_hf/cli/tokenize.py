"""`minigpt tokenize`: tokenize a text once, into a folder that `minigpt train --data` reads on any machine."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MiniGPTError
from .parser import quiet
from .train import parser as parser_of_train
from .train import show_help, split_recipe


def parser() -> argparse.ArgumentParser:
    """The arguments of the command: those of training, of which only the data settings have an effect."""
    return parser_of_train("tokenize")


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


def run(argv: list[str]) -> int | None:
    """Tokenize the text and save it. Returns the exit code if it was interrupted."""
    try:
        with raising_on_sigterm():
            _run(argv)
    except Terminated:
        print("minigpt tokenize: stopped by SIGTERM; nothing was saved", file=sys.stderr)
        return 128 + signal.SIGTERM
    return None


def _run(argv: list[str]) -> None:
    if show_help("tokenize", argv):
        return
    from ..training.autoconfig import AutoConfigurator
    from ..training.recipe import parse_arguments
    from ..training.run_folder import RunFolder
    from ..training.train import prepare_text

    recipe, rest = split_recipe(argv)
    arguments = parse_arguments(rest, recipe)
    training = arguments.training
    if arguments.data.chat:
        raise MiniGPTError("--chat: conversations are tokenized by `minigpt train`; give it the tables")
    if "--output_dir" not in {flag.partition("=")[0] for flag in rest}:
        raise MiniGPTError("--output_dir FOLDER is required")
    quiet()
    folder = Path(training.output_dir)
    if folder.exists():
        raise MiniGPTError(f"--output_dir {folder}: already exists; give another folder, or remove it")
    configurator = AutoConfigurator(arguments, RunFolder(folder), time.perf_counter())
    text = prepare_text(configurator.data, configurator.choose_tokenizer)
    text.save(folder, vars(configurator.data))
    held_out = f"{len(text.validation):,} validation tokens" if text.validation else "no validation split"
    print(
        f"{folder}: {text.train.characters:,} characters -> {len(text.train):,} tokens of "
        f"{text.train.bytes / len(text.train):.2f} bytes; {held_out} ({text.split_description})\n"
        f"minigpt train --data {folder} …  trains on it"
    )
