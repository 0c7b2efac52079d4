"""`README.md`, the card: what the Hub shows of a model, and what its widget sends as a prompt.

In: a `Folder`. Out: rows. Samples and snippets stand in fences, where markup is text; the rest is prose, which is to have
no placeholder left and nothing that acts.
"""

import re
import reprlib
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .folder import Folder, is_minigpt
from .row import NotApplicable, Row, check, failed, is_invisible, passed, some

CARD = "README.md"
# No pattern takes a time that grows faster than the card: repetitions are bounded, or cannot overlap.
PLACEHOLDER = re.compile(
    r"\{\{[^{}]{0,200}\}\}|\{%[^{}]{0,200}%\}|\[More Information Needed\]|\bTODO\b|\bFIXME\b|\bTBD\b|[Ll]orem ipsum"
    r"|\b[Yy]our[-_](?:username|name|model|repo)\b|<(?:[Yy]our|[Ii]nsert)\b[^<>]{0,100}>|\| *(?:None|nan|NaN) *(?=\|)"
)
ACTIVE = re.compile(
    r"< {0,9}(?:script|iframe|object|embed|form|meta|link|base)\b|<[^<>]{0,200}\son\w{1,20}\s{0,9}="
    r"|javascript:|data:text/html",
    re.I,
)
# An escape sequence moves the cursor of a terminal; the others turn the direction of text.
STEERING = re.compile("[\x1b\x9b\u202a-\u202e\u2066-\u2069]")
# A fence closes with at least as many of the same marks as it opened with (CommonMark 4.5).
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.M | re.S)
CODE = re.compile(r"(?<!`)(`{1,2})[^`]{1,500}\1(?!`)")


def prose(card: str) -> str:
    """A card without its metadata, its fences and its `code`."""
    return CODE.sub("", FENCE.sub("", REGEX_YAML_BLOCK.sub("", card, count=1)))


def _card(folder: Folder) -> str:
    if CARD not in folder.files:
        raise NotApplicable(f"there is no {CARD}")
    return folder.text(CARD)


def _metadata(folder: Folder) -> dict[str, Any]:
    block = REGEX_YAML_BLOCK.search(_card(folder))
    try:
        content = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, RecursionError) as error:
        raise NotApplicable(f"the metadata of {CARD} do not parse") from error
    return content if isinstance(content, dict) else {}


@check("card")
def metadata(folder: Folder) -> Row:
    """What huggingface_hub itself says of the card, and three traps that it lets pass."""
    text = _card(folder)
    if not REGEX_YAML_BLOCK.search(text):
        return failed(f"{CARD} has no metadata", "begin it with a block of YAML between two lines of ---")
    try:
        data = ModelCard(text).data.to_dict()
        values = _metadata(folder)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        return failed(f"{CARD}: {' '.join(str(error).split())}", "correct its metadata")
    if not values:
        return failed(f"{CARD} has empty metadata", "name library, pipeline and tags")
    for name in ("language", "license", "tags", "datasets", "pipeline_tag", "library_name"):
        value = values.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not isinstance(entry, str):  # YAML reads the language `no` as false
                return failed(f"{CARD}: `{name}` holds {reprlib.repr(entry)}, which is no text", "write it in quotes")
    task = values.get("pipeline_tag")
    if is_minigpt(folder) and task not in (None, "text-generation"):
        return failed(f"{CARD}: `pipeline_tag` is {reprlib.repr(task)}", "a causal language model does text-generation")
    for result in data.get("model-index", [{}])[0].get("results", []):
        for metric in result["metrics"]:
            if not isinstance(metric["value"], int | float) or metric["value"] != metric["value"]:
                return failed(
                    f"{CARD}: a result is {reprlib.repr(metric['value'])}, no number", "fill it in, or take it out"
                )
    return passed(f"{len(values)} fields")


@check("card filled in")
def filled_in(folder: Folder) -> Row:
    if left := [match[0].strip() for match in PLACEHOLDER.finditer(prose(_card(folder)))]:
        return failed(f"{CARD} has placeholders: {some(left)}", "fill them in")
    return passed("no placeholder left")


@check("card inert")
def inert(folder: Folder) -> Row:
    text = _card(folder)
    words = prose(text)
    if match := ACTIVE.search(words):
        return failed(f"{CARD} has markup that acts: {match[0]}", "delete it; put samples of text in a fence")
    steering = STEERING.findall(text) + [c for c in words if is_invisible(c) and ord(c) < 32 and c not in "\n\r\t"]
    if steering:
        return failed(f"{CARD} has control characters: {some(sorted(map(repr, set(steering))))}", "delete them")
    return passed("text only")


@check("prompts inert")
def prompts(folder: Folder) -> Row:
    """Prompts are put into web pages and terminals by others."""
    found = list(_prompts(folder))
    if not found:
        raise NotApplicable("no prompt in card or minigpt.json")
    for place, prompt in found:
        match = ACTIVE.search(prompt) or STEERING.search(prompt) or re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", prompt)
        if match:
            return failed(f"{place}: a prompt has {match[0]!r}", "choose a prompt of plain text")
    return passed(f"{len(found)} of plain text")


def _prompts(folder: Folder) -> Iterator[tuple[str, str]]:
    if CARD in folder.files:
        widget = _metadata(folder).get("widget")
        for entry in widget if isinstance(widget, list) else []:
            prompt = entry.get("text") if isinstance(entry, dict) else entry
            if isinstance(prompt, str):
                yield CARD, prompt
    about = folder.json_if_there("minigpt.json")
    for part, name in (("sample", "prompt"), ("recipe", "sample_prompt")):
        if isinstance(about.get(part), dict) and isinstance(about[part].get(name), str):
            yield "minigpt.json", about[part][name]


CHECKS = (metadata, filled_in, inert, prompts)
