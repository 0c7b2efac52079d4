"""`minigpt tokenize`: tokenize a text once, into a folder that `minigpt train --data` reads on any machine."""

import argparse
import logging
import time
from pathlib import Path

from ..errors import MiniGPTError
from .parser import Parser, quiet, raising_on_sigterm
from .train import parser as parser_of_train
from .train import show_help, split_recipe

CHAT = "--chat: conversations are tokenized by `minigpt train`; give it the tables"


def parser() -> argparse.ArgumentParser:
    """The arguments of the command: those of training, of which only the data settings have an effect, and of shards."""
    return parser_of_train("tokenize", [shards_parser()])


def shards_parser() -> argparse.ArgumentParser:
    """The arguments for shards."""
    parser = Parser("tokenize", add_help=False)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="Tokenize only a share of the files or rows, number I of N from 0, into a folder in output_dir that is written "
        "atomically. Requires an existing tokenizer. A shard that is complete is not written again.",
    )
    parser.add_argument(
        "--merge",
        metavar="FOLDER",
        help="Verify the shards in a folder and write an index, so that `minigpt train --data FOLDER` reads them as one "
        "text. Also for the .ds files of datatrove, with --tokenizer.",
    )
    return parser


def run(argv: list[str]) -> None:
    """Tokenize the text and save it."""
    if show_help("tokenize", argv):
        return
    from transformers.hf_argparser import string_to_bool

    own = shards_parser()
    own.add_argument("--chat", type=string_to_bool, nargs="?", const=True, default=False)
    sharing, argv = own.parse_known_args(argv)
    if sharing.chat:  # rejected here, because `parse_arguments` would require a base model
        raise MiniGPTError(CHAT)
    if sharing.merge is not None:
        if sharing.shard is not None:
            raise MiniGPTError("--merge and --shard: write all shards first, then merge them")
        merge(Path(sharing.merge), argv)
        return

    from ..atomic import check_new_folder
    from ..data.files import Share
    from ..training.arguments import log_on_main_process
    from ..training.autoconfig import AutoConfigurator
    from ..training.recipe import parse_arguments
    from ..training.run_folder import RunFolder
    from ..training.text import prepare_shard, prepare_text

    recipe, rest = split_recipe(argv)
    share = None if sharing.shard is None else Share.parse(sharing.shard)
    arguments = parse_arguments(rest, recipe)
    training = arguments.training
    if arguments.data.chat:
        raise MiniGPTError(CHAT)
    if "--output_dir" not in {flag.partition("=")[0] for flag in rest}:
        raise MiniGPTError("--output_dir FOLDER is required")
    quiet()
    folder = Path(training.output_dir)
    if share is not None:
        if "vocab_size" in training.given_in_command:
            log_on_main_process(training, "vocab_size: no effect with --shard", logging.WARNING)
        with raising_on_sigterm():
            is_new = prepare_shard(arguments.data, share, folder)
        remaining = share.count - len(list(folder.glob(f"shard-*-of-{share.count:05}")))
        missing = f"missing shards: {remaining:,} of {share.count:,}"
        following = missing if remaining else f"next: minigpt tokenize --merge {folder}"
        print(f"{folder / str(share)}: {'written' if is_new else 'already complete'}; {following}")
        return
    check_new_folder(folder)
    configurator = AutoConfigurator(arguments, RunFolder(folder), time.perf_counter())
    with raising_on_sigterm():
        text = prepare_text(configurator.data, configurator.choose_tokenizer, configurator.choose_block_size)
        configurator.report_vocabulary(text)
        text.save(folder, vars(configurator.data))
    held_out = f"{len(text.validation):,} validation tokens" if text.validation else "no validation split"
    print(
        f"{folder}: {text.train.characters:,} characters -> {len(text.train):,} tokens of "
        f"{text.train.bytes / len(text.train):.2f} bytes; {held_out} ({text.split_description})\n"
        f"minigpt train --data {folder} …  trains on it"
    )


def merge(folder: Path, argv: list[str]) -> None:
    """Merge the shards in a folder."""
    parser = Parser("tokenize --merge FOLDER")
    parser.add_argument("--tokenizer")
    parser.add_argument("--cache_dir", type=Path)
    arguments = parser.parse_args(argv)

    from ..data.corpus import CACHE
    from ..data.shards import merge_shards

    quiet()
    with raising_on_sigterm():
        summary = merge_shards(folder, arguments.cache_dir or CACHE, arguments.tokenizer)
    print(f"{summary}\nminigpt train --data {folder} …  trains on it")
