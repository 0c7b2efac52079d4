"""`minigpt tokenize`: tokenize a text once, into a folder that `minigpt train --data` reads on any machine."""

import argparse
import time
from pathlib import Path

from ..errors import MiniGPTError
from .parser import quiet, raising_on_sigterm
from .train import parser as parser_of_train
from .train import show_help, split_recipe


def parser() -> argparse.ArgumentParser:
    """The arguments of the command: those of training, of which only the data settings have an effect."""
    return parser_of_train("tokenize")


def run(argv: list[str]) -> None:
    """Tokenize the text and save it."""
    if show_help("tokenize", argv):
        return
    from ..atomic import check_new_folder
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
    check_new_folder(folder)
    configurator = AutoConfigurator(arguments, RunFolder(folder), time.perf_counter())
    with raising_on_sigterm():
        text = prepare_text(configurator.data, configurator.choose_tokenizer)
        text.save(folder, vars(configurator.data))
    held_out = f"{len(text.validation):,} validation tokens" if text.validation else "no validation split"
    print(
        f"{folder}: {text.train.characters:,} characters -> {len(text.train):,} tokens of "
        f"{text.train.bytes / len(text.train):.2f} bytes; {held_out} ({text.split_description})\n"
        f"minigpt train --data {folder} …  trains on it"
    )
