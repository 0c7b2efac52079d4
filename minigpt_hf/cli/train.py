"""`minigpt train`: a text and a recipe -> a run, and in it a model folder."""

import argparse
import time

from .parser import quiet


def parser() -> argparse.ArgumentParser:
    """Every setting there is: ours and those of `TrainingArguments`."""
    from ..training.arguments import argument_parser

    return argument_parser(prog="minigpt train", parents=[_recipe()])


def run(argv: list[str]) -> None:
    """Read the recipe, let the flags override it, and train."""
    if "--help" in argv or "-h" in argv:
        parser().print_help()
        return
    began = time.perf_counter()  # imports count as minutes, too

    from ..training.arguments import parse_arguments

    recipe, rest = _recipe().parse_known_args(argv)
    arguments = parse_arguments(rest, recipe.recipe)

    from .. import run

    quiet()
    run.train(arguments, began)


def _recipe() -> argparse.ArgumentParser:
    from ..training.arguments import recipe_names

    parser = argparse.ArgumentParser(prog="minigpt train", add_help=False, allow_abbrev=False)
    names = ", ".join(recipe_names())
    parser.add_argument(
        "--recipe",
        help=f"Settings that the other flags override: {names}, or a YAML file. Default: demo, or what --minutes or --size "
        "choose.",
    )
    return parser
