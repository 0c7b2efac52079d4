"""`minigpt train`: train a model from a recipe, a text and flags; writes a run folder with the model folder."""

import argparse
import time
from collections.abc import Sequence
from importlib import import_module

from .parser import quiet
from .settings_help import short_help


def parser(verb: str = "train", parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    """All settings, including those of `TrainingArguments`, with their effective defaults."""
    from ..training.recipe import argument_parser, effective_defaults

    parser = argument_parser(prog=f"minigpt {verb}", parents=[_recipe_parser(), *parents])
    for name, (without, alone) in effective_defaults().items():
        parser.set_defaults(**{name: without if without == alone else f"{without}; with --data alone: {alone}"})
    return parser


def run(argv: list[str]) -> None:
    """Read the recipe, override it by the flags, and train."""
    if show_help("train", argv):
        return
    began = time.perf_counter()  # --minutes includes the time of imports

    from ..training.recipe import parse_arguments

    recipe, rest = split_recipe(argv)
    arguments = parse_arguments(rest, recipe)

    from ..training import train as run

    quiet()
    run.train(arguments, began)


def show_help(command: str, argv: list[str]) -> bool:
    """Print the help of `train` or `tokenize` if `argv` asks for it. Returns whether it does."""
    if "--help-all" in argv:
        import_module(f"{__package__}.{command}").parser().print_help()
        return True
    if "--help" in argv or "-h" in argv:
        print(short_help(command), end="")
        return True
    return False


def split_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """["--recipe", "demo", "--max_steps", "9"] -> ("demo", ["--max_steps", "9"])."""
    chosen, rest = _recipe_parser().parse_known_args(argv)
    return chosen.recipe, rest


def _recipe_parser() -> argparse.ArgumentParser:
    from ..training.recipe import recipe_names

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ", ".join(recipe_names())
    parser.add_argument(
        "--recipe",
        help=f"Recipe whose settings the other flags override: {names}, or a YAML file. Default: demo; auto with --data, "
        "finetune with --init_from, lora with --lora_rank; none with --minutes or --size, which choose the settings.",
    )
    return parser
