"""`minigpt recipes`: what recipes there are, what they cost, and what came of them."""

import textwrap

from ..errors import MiniGPTError
from .parser import Parser


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("recipes")
    parser.add_argument("show", nargs="?", choices=["show"], help="print a recipe, comments and all")
    parser.add_argument("name", nargs="?", help="which one")
    return parser


def run(argv: list[str]) -> None:
    """A paragraph for each, or the file of one."""
    args = parser().parse_args(argv)

    from ..training.recipe import recipe_names, recipe_notes, recipe_text

    if args.show:
        if args.name is None:
            raise MiniGPTError(f"recipes show: which one? {', '.join(recipe_names())}")
        print(recipe_text(args.name), end="")
        return
    for name in recipe_names():
        notes = recipe_notes(name)
        print(f"{name}\n  {notes.pop('what')}")
        for what, note in notes.items():
            print(textwrap.fill(note, 110, initial_indent=f"  {what:<13}", subsequent_indent=" " * 15))
        print()
    print("minigpt recipes show NAME  prints one; copy it, change it, and train with --recipe FILE.yaml")
