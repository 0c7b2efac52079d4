"""`minigpt recipes`: list the recipes with model size, cost and result, or print one."""

import textwrap

from ..errors import MiniGPTError
from .parser import Parser


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser("recipes")
    parser.add_argument("show", nargs="?", choices=["show"], help="print a recipe with its comments")
    parser.add_argument("name", nargs="?", help="name of the recipe")
    return parser


def run(argv: list[str]) -> None:
    """Print a summary of every recipe, or the file of one."""
    args = parser().parse_args(argv)

    from ..training.recipe import recipe_names, recipe_notes, recipe_text

    if args.show:
        if args.name is None:
            raise MiniGPTError(f"recipes show: name a recipe: {', '.join(recipe_names())}")
        print(recipe_text(args.name), end="")
        return
    for name in recipe_names():
        notes = recipe_notes(name)
        print(f"{name}\n  {notes.pop('what')}")
        for what, note in notes.items():
            print(textwrap.fill(note, 110, initial_indent=f"  {what:<13}", subsequent_indent=" " * 15))
        print()
    print("minigpt recipes show NAME  prints a recipe; to modify it, save it and train with --recipe FILE.yaml")
