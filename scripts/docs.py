"""Write what the documents say of themselves: outputs in docs/walkthrough.md, and all of docs/cli.md.

    python scripts/docs.py            # writes them
    python scripts/docs.py --check    # exit code 1 if one is not what it should be

In: the Python blocks of the walkthrough, run in order in one process, and the parsers of the verbs. It refuses to touch
prose.
"""

import argparse
import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

from minigpt_hf.cli import VERBS
from minigpt_hf.training.arguments import GROUPS
from minigpt_hf.training.recipe import effective_defaults

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """# The command line

Made from `--help` by `python scripts/docs.py`; `minigpt <verb> --help` prints the same. What a user can put right is told in
one line, with exit code 2; `--debug` after a verb shows where it came from.
"""
OF_TRAIN = """`--recipe NAME` or `--recipe FILE.yaml` sets what the flags override. Besides these, every flag of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) works.
"""
OF_TOKENIZE = """Takes what `train` takes; `--output_dir` names the folder, and only what concerns the text is looked at.
"""
# A block of Python, and what it printed, if it printed something.
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def walkthrough() -> str:
    """The document with the outputs that its code gives now."""
    names: dict = {}

    def run(block: re.Match) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(block["code"], names)
        output = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{block['code']}```\n{output}"

    return BLOCK.sub(run, (DOCS / "walkthrough.md").read_text(encoding="utf-8"))


def cli() -> str:
    """Every verb and every option, as `--help` tells them."""
    parts = [INTRODUCTION]
    for verb, summary in VERBS.items():
        parts.append(f"\n## minigpt {verb}\n\n{summary[0].upper()}{summary[1:]}.\n\n")
        if verb == "train":
            parts.append(OF_TRAIN)
            parts += [f"\n{group.__doc__.splitlines()[0]}\n\n{_table(_of_dataclass(group))}" for group in GROUPS]
            continue
        if verb == "tokenize":
            parts.append(OF_TOKENIZE)
            continue
        parser = import_module(f"minigpt_hf.cli.{verb}").parser()
        parts.append(_table(_of_parser(parser)))
        if parser.epilog:
            parts.append(f"\n{parser.epilog}\n")
    return "".join(parts)


def _of_dataclass(group) -> list[tuple[str, str, str]]:
    own = [each for each in fields(group) if each.init and each.name in group.__annotations__]
    effective = {
        name: f"`{without}`" if without == alone else f"`{without}`; with `--data` alone {alone}"
        for name, (without, alone) in effective_defaults().items()
    }
    return [
        (f"--{each.name}", effective.get(each.name) or _written(each.default), each.metadata["help"].replace("%%", "%"))
        for each in own
    ]


def _of_parser(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    rows = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            name = ", ".join(action.option_strings) or action.dest.upper()
            rows.append((name, "" if "(default" in (action.help or "") else _written(action.default), action.help))
    return rows


def _written(default) -> str:
    return (
        ""
        if default is None or default is MISSING or default is False
        else f"`{default}`"
        if default != ""
        else "empty"
    )


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {default} | {what} |\n".replace("||", "| |") for name, default, what in rows]
    return "| | default | |\n|---|---|---|\n" + "".join(lines)


def main() -> int:
    """Write the documents, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    differing = 0
    for name, text in (("walkthrough.md", walkthrough()), ("cli.md", cli())):
        file = DOCS / name
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        differing += 1
        if not check:
            file.write_text(text, encoding="utf-8")
        print(f"{file.relative_to(DOCS.parent)} {'differs' if check else 'is written anew'}")
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
