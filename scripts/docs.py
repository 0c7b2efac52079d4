"""Generate the documentation that depends on the code: the outputs in docs/walkthrough.md, docs/cli.md, and the tables of
docs/scale.md.

    python scripts/docs.py            # update the documents
    python scripts/docs.py --check    # exit code 1 if a document is outdated

The Python blocks of the walkthrough run in order in one process; its prose is not changed. docs/cli.md is generated from
the parsers of the commands. The tables of docs/scale.md are those of scripts/scale.py with its default inputs.
"""

import argparse
import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import scale

from minigpt_cli import COMMANDS
from minigpt_hf.cli.settings_help import shown_default, transformers_defaults
from minigpt_hf.cli.tokenize import shards_parser
from minigpt_hf.training.arguments import GROUPS, MiniGPTTrainingArguments
from minigpt_hf.training.recipe import effective_defaults

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """# Command line

Generated from the parsers by `python scripts/docs.py`; `minigpt <command> --help` prints the same. Invalid input and errors
of the operating system are reported in one line, with exit code 2; with `--debug` after the command, with a traceback.
"""
TRAIN = """`--recipe NAME` or `--recipe FILE.yaml` gives settings, which flags override. Every setting of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) is a flag, too. `--help` prints the
common settings, `--help-all` all of them.
"""
TOKENIZE = """Takes the flags of `train`; `--output_dir` is the folder to write. Only settings of the data have an effect.
[large-corpora.md](large-corpora.md) describes shards.

"""
CHANGED = """
Defaults of `TrainingArguments` that minigpt changes:

"""
INHERITED = """
Settings of `TrainingArguments` with unchanged defaults: """
# A table of scripts/scale.py in docs/scale.md.
PLANNED = re.compile(r"<!-- python scripts/scale\.py (?P<table>\w+) -->\n.*?<!-- end -->", re.DOTALL)
# A Python block, and the block with its output, if there is one.
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def walkthrough() -> str:
    """Return docs/walkthrough.md with the current outputs of its code."""
    names: dict = {}

    def run(block: re.Match) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(block["code"], names)
        output = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{block['code']}```\n{output}"

    return BLOCK.sub(run, (DOCS / "walkthrough.md").read_text(encoding="utf-8"))


def cli() -> str:
    """Return docs/cli.md: every command with its options."""
    parts = [INTRODUCTION]
    for command, summary in COMMANDS.items():
        parts.append(f"\n## minigpt {command}\n\n{summary[0].upper()}{summary[1:]}.\n\n")
        if command == "train":
            parts.append(TRAIN)
            parts += [f"\n{group.__doc__.splitlines()[0]}\n\n{_table(_of_dataclass(group))}" for group in GROUPS]
            parts += [CHANGED, _changed_defaults(), INHERITED, _inherited_flags(), ".\n"]
            continue
        if command == "tokenize":
            parts += [TOKENIZE, _table(_of_parser(shards_parser()))]
            continue
        parser = import_module(f"minigpt_hf.cli.{command}").parser()
        parts.append(_table(_of_parser(parser)))
        if parser.epilog:
            parts.append(f"\n{parser.epilog}\n")
    return "".join(parts)


def plan() -> str:
    """Return docs/scale.md with the current tables of scripts/scale.py."""

    def computed(block: re.Match) -> str:
        name = block["table"]
        return f"<!-- python scripts/scale.py {name} -->\n\n{scale.TABLES[name](scale.Inputs())}\n<!-- end -->"

    return PLANNED.sub(computed, (DOCS / "scale.md").read_text(encoding="utf-8"))


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
    if default is None or default is MISSING or default is False:
        return ""
    return "empty" if default == "" else f"`{default}`"


def _changed_defaults() -> str:
    """Table of the settings of `TrainingArguments` whose default differs in minigpt."""
    theirs = transformers_defaults()
    effective = effective_defaults()
    lines = []
    for each in fields(MiniGPTTrainingArguments):
        if each.name not in theirs or each.name == "output_dir":
            continue
        ours, with_data = effective.get(each.name, (shown_default(each.default),) * 2)
        if theirs[each.name] not in (ours, with_data) or ours != with_data:
            with_data = "" if with_data == ours else with_data
            lines.append(f"| `--{each.name}` | {ours} | {with_data} | {theirs[each.name]} |\n")
    return "| | minigpt | with `--data` alone | transformers |\n|---|---|---|---|\n" + "".join(lines)


def _inherited_flags() -> str:
    """All settings of `TrainingArguments` that minigpt takes over with their defaults."""
    own = MiniGPTTrainingArguments.__annotations__
    return ", ".join(f"`--{name}`" for name in sorted(transformers_defaults()) if name not in own)


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| `{name}` | {default} | {description} |\n".replace("||", "| |") for name, default, description in rows]
    return "| | default | |\n|---|---|---|\n" + "".join(lines)


def main() -> int:
    """Write the documents, or compare them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the documents without writing them")
    check = parser.parse_args().check
    is_outdated = False
    for name, text in (("walkthrough.md", walkthrough()), ("cli.md", cli()), ("scale.md", plan())):
        file = DOCS / name
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        is_outdated = True
        if not check:
            file.write_text(text, encoding="utf-8")
        print(f"{file.relative_to(DOCS.parent)}: {'outdated' if check else 'updated'}")
    return 1 if check and is_outdated else 0


if __name__ == "__main__":
    sys.exit(main())
