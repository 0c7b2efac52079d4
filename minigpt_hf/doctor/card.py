"""Checks of `README.md`, the model card, and of prompts that other programs display.

Samples and code are in fenced blocks, in which markup has no effect; the rest must contain no placeholder and no active
markup.
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
# Every pattern runs in linear time: repetitions are bounded or cannot overlap.
PLACEHOLDER = re.compile(
    r"\{\{[^{}]{0,200}\}\}|\{%[^{}]{0,200}%\}|\[More Information Needed\]|\bTODO\b|\bFIXME\b|\bTBD\b|[Ll]orem ipsum"
    r"|\b[Yy]our[-_](?:username|name|model|repo)\b|<(?:[Yy]our|[Ii]nsert)\b[^<>]{0,100}>|\| *(?:None|nan|NaN) *(?=\|)"
)
ACTIVE = re.compile(
    r"< {0,9}(?:script|iframe|object|embed|form|meta|link|base)\b|<[^<>]{0,200}\son\w{1,20}\s{0,9}="
    r"|javascript:|data:text/html",
    re.I,
)
# Escape characters control a terminal; the others change the direction of text.
CONTROL = re.compile("[\x1b\x9b\u202a-\u202e\u2066-\u2069]")
# The closing fence has at least as many characters as the opening one (CommonMark 4.5).
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.M | re.S)
CODE = re.compile(r"(?<!`)(`{1,2})[^`]{1,500}\1(?!`)")


def prose(card: str) -> str:
    """The card without metadata, fenced blocks and code spans."""
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
    """Validate with huggingface_hub, and check types, task and results, which it does not."""
    text = _card(folder)
    if not REGEX_YAML_BLOCK.search(text):
        return failed(f"{CARD} has no metadata", "start it with a YAML block between two lines of ---")
    try:
        data = ModelCard(text).data.to_dict()
        values = _metadata(folder)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        return failed(f"{CARD}: {' '.join(str(error).split())}", "correct its metadata")
    if not values:
        return failed(f"{CARD} has empty metadata", "add library_name, pipeline_tag and tags")
    for name in ("language", "license", "tags", "datasets", "pipeline_tag", "library_name"):
        value = values.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not isinstance(entry, str):  # YAML parses the language `no` as false
                return failed(f"{CARD}: `{name}` holds {reprlib.repr(entry)}, which is not a string", "quote it")
    task = values.get("pipeline_tag")
    if is_minigpt(folder) and task not in (None, "text-generation"):
        return failed(f"{CARD}: `pipeline_tag` is {reprlib.repr(task)}", "set it to text-generation")
    for result in data.get("model-index", [{}])[0].get("results", []):
        for metric in result["metrics"]:
            if not isinstance(metric["value"], int | float) or metric["value"] != metric["value"]:
                return failed(
                    f"{CARD}: a result is {reprlib.repr(metric['value'])}, not a number", "correct or remove it"
                )
    return passed(f"{len(values)} fields")


@check("card filled in")
def filled_in(folder: Folder) -> Row:
    if left := [match[0].strip() for match in PLACEHOLDER.finditer(prose(_card(folder)))]:
        return failed(f"{CARD} has placeholders: {some(left)}", "replace them")
    return passed("no placeholder")


@check("card inert")
def inert(folder: Folder) -> Row:
    text = _card(folder)
    words = prose(text)
    if match := ACTIVE.search(words):
        return failed(f"{CARD} has active markup: {match[0]}", "remove it, or put samples into a fenced block")
    control = CONTROL.findall(text) + [c for c in words if is_invisible(c) and ord(c) < 32 and c not in "\n\r\t"]
    if control:
        return failed(f"{CARD} has control characters: {some(sorted(map(repr, set(control))))}", "delete them")
    return passed("no active markup")


@check("prompts inert")
def prompts(folder: Folder) -> Row:
    """The Hub shows the prompts of the widget in web pages; those in `minigpt.json` are only shown by the package itself."""
    found = list(_prompts(folder))
    if not found:
        raise NotApplicable("no prompt in the card or minigpt.json")
    for place, prompt in found:
        match = CONTROL.search(prompt) or re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", prompt)
        if place == CARD:
            match = ACTIVE.search(prompt) or match
        if match:
            return failed(f"{place}: a prompt has {match[0]!r}", "use a plain-text prompt")
    return passed(f"{len(found)} plain-text prompts")


def _prompts(folder: Folder) -> Iterator[tuple[str, str]]:
    if CARD in folder.files:
        widget = _metadata(folder).get("widget")
        for entry in widget if isinstance(widget, list) else []:
            prompts = [entry.get("text") if isinstance(entry, dict) else entry]
            messages = entry.get("messages") if isinstance(entry, dict) else None
            for message in messages if isinstance(messages, list) else []:
                prompts.append(message.get("content") if isinstance(message, dict) else message)
            yield from ((CARD, prompt) for prompt in prompts if isinstance(prompt, str))
    about = folder.json_if_there("minigpt.json")
    for part, name in (("sample", "prompt"), ("recipe", "sample_prompt")):
        if isinstance(about.get(part), dict) and isinstance(about[part].get(name), str):
            yield "minigpt.json", about[part][name]


CHECKS = (metadata, filled_in, inert, prompts)
