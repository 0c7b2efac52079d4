"""`minigpt tokenize`: a text and a recipe -> a folder of token streams that `minigpt train --data` takes, on any machine."""

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
    """What this verb takes: what training takes; only what concerns the text is looked at."""
    return parser_of_train("tokenize")


class Terminated(BaseException):
    """SIGTERM arrived. As a `BaseException` it passes every handler of errors, and everything is cleaned up."""


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` where SIGTERM would end the process at once; a second one does."""

    def terminate(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # Python cannot set a handler there
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(argv: list[str]) -> int | None:
    """Prepare the text and save it; return an exit code if it was interrupted."""
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
    from ..training.autoconfig import Dial
    from ..training.recipe import parse_arguments
    from ..training.train import prepare_text

    recipe, rest = split_recipe(argv)
    arguments = parse_arguments(rest, recipe)
    data, _, training = arguments
    if "--output_dir" not in {flag.partition("=")[0] for flag in rest}:
        raise MiniGPTError("say where to keep it: --output_dir FOLDER")
    quiet()
    folder = Path(training.output_dir)
    if folder.exists():
        raise MiniGPTError(f"--output_dir {folder}: is there already; name another folder, or remove it")
    text = prepare_text(data, Dial(arguments, folder, time.perf_counter()).choose_tokenizer)
    text.keep(folder, vars(data))
    held_out = f"{len(text.validation):,} tokens held out" if text.validation else "nothing held out"
    print(
        f"{folder}: {text.train.characters:,} characters -> {len(text.train):,} tokens of "
        f"{text.train.bytes / len(text.train):.2f} bytes; {held_out} ({text.cut})\n"
        f"minigpt train --data {folder} …  learns from it"
    )
