"""The code that a folder brings along, and the settings that lead to it: read, never run.

In: a `Folder`. Out: rows. transformers copies a module and what it imports by `from .name import …` into a cache and runs
it there; so code has to be flat files of this folder, and `auto_map` has to name classes in them.
"""

import ast
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import jinja2

from .files import SUITCASE
from .folder import Folder, Unreadable
from .row import NotApplicable, Row, check, failed, passed, plain, some

AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForDecision",
)
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
# How transformers finds what a module imports: line by line, docstrings included.
SCANNED = re.compile(
    r"^[^\S\n]*import\s{1,99}\.(\S{1,99})[^\S\n]*$|^[^\S\n]*from\s{1,99}\.(\S{1,99})\s{1,99}import", re.M
)
# Characters that turn the direction of text: code that reads one way and runs another (CVE-2021-42574).
TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own, which plain jinja does not know


def references(folder: Folder) -> dict[str, str]:
    """Every class that a setting asks a loader to import: where it stands -> "module.Class"."""
    found: dict[str, str] = {}

    def collect(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                collect(f"{place}.{name}", entry)
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                collect(f"{place}[{i}]", entry)
        elif value is not None:
            found[place] = str(value)

    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        settings = folder.json_if_there(file)
        collect(f"{file}: auto_map", settings.get("auto_map"))
        pipelines = settings.get("custom_pipelines")
        for name, pipeline in (pipelines if isinstance(pipelines, dict) else {}).items():
            implementation = pipeline.get("impl") if isinstance(pipeline, dict) else pipeline
            collect(f"{file}: custom_pipelines.{name}", implementation)
    return found


@check("auto_map")
def auto_map(folder: Folder) -> Row:
    config, named = folder.json("config.json"), references(folder)
    wanted = AUTO_CLASSES if config.get("model_type") == "minigpt" else ()
    if not named and not wanted:
        raise NotApplicable("the folder brings no code of its own")
    own = config.get("auto_map") if isinstance(config.get("auto_map"), dict) else {}
    if absent := [name for name in wanted if name not in own]:
        return failed(f"no entry for {some(absent, 6)}", "copy `auto_map` from where the model was trained")
    faults = [f"{place} is {entry!r}, {fault}" for place, entry in named.items() if (fault := _misled(folder, entry))]
    if faults:
        return failed(some(faults), "name `module.Class`, of a module that lies in the folder")
    return passed(f"{len(named)} entries, all in the folder")


def _misled(folder: Folder, entry: str) -> str:
    """What is wrong with a reference; nothing, if it names a class of a module in the folder."""
    if "--" in entry:
        return "code of another repository"
    match = REFERENCE.fullmatch(entry)
    if match is None:
        return "not a module of this folder and a class in it"
    if f"{match[1]}.py" not in folder.files:
        return f"but there is no {match[1]}.py"
    try:
        defined = {node.name for node in _tree(folder, f"{match[1]}.py").body if isinstance(node, ast.ClassDef)}
    except (SyntaxError, Unreadable):
        return ""  # the row `code` says so
    return "" if match[2] in defined else f"but {match[1]}.py defines no such class"


@check("code")
def importable(folder: Folder) -> Row:
    """Every module that `auto_map` leads to, and every module that those import."""
    modules = {match[1] for entry in references(folder).values() if (match := REFERENCE.fullmatch(entry))}
    queue = sorted(f"{module}.py" for module in modules if f"{module}.py" in folder.files)
    if not queue:
        raise NotApplicable("the folder brings no code of its own")
    seen: list[str] = []
    while queue:
        name = queue.pop()
        seen.append(name)
        try:
            imported = list(_imports(folder, name))
        except SyntaxError as error:
            return failed(f"{name}, line {error.lineno}: {error.msg}", "restore the file")
        for module, fault in imported:
            if fault:
                return failed(f"{name}: {fault}", "import from files beside this one, by `from .name import …`")
            if module not in seen and module not in queue:
                queue.append(module)
    return passed(f"{some(sorted(seen))}: read, not run")


def _tree(folder: Folder, name: str) -> ast.Module:
    text = folder.text(name)
    if match := TURNING.search(text):
        raise SyntaxError(f"a character that turns the direction of text ({plain(match[0])})", (name, None, None, None))
    with warnings.catch_warnings():
        for category in (SyntaxWarning, DeprecationWarning):  # of an odd escape in a string, which is no fault
            warnings.simplefilter("ignore", category)
        try:
            return ast.parse(text)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(f"cannot be parsed ({error})", (name, None, None, None)) from error


def _imports(folder: Folder, name: str) -> Iterator[tuple[str, str]]:
    """(file beside it, what is wrong with the import) for all that a module imports relatively or cannot find."""
    tree = _tree(folder, name)
    unconditional = set(map(id, tree.body))  # what stands inside an `if`, a `try` or a function may be absent
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            spelled = f"from {'.' * node.level}{node.module or ''} import …"
            if node.level > 1 or not node.module or "." in node.module:
                yield "", f"line {node.lineno}: `{spelled}` is more than one level"
            elif f"{node.module}.py" not in folder.files:
                yield "", f"line {node.lineno}: `{spelled}`, and there is no {node.module}.py"
            else:
                yield f"{node.module}.py", ""
        elif isinstance(node, ast.Import | ast.ImportFrom):
            asked = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for package in {module.split(".")[0] for module in asked}:
                if package == "minigpt_hf" and name in SUITCASE:
                    yield "", f"line {node.lineno}: imports minigpt_hf, which a stranger does not have"
                elif id(node) in unconditional and package not in sys.stdlib_module_names and not find_spec(package):
                    yield "", f"line {node.lineno}: imports {package}, which is not installed"
    for module in {plainly or from_it for plainly, from_it in SCANNED.findall(folder.text(name))}:
        if f"{module}.py" not in folder.files:
            yield "", f"transformers takes a line of it for an import of `.{module}`, which is not there"


@check("chat template")
def chat_template(folder: Folder) -> Row:
    """A chat template is a program: it has to parse, and to keep to the messages."""
    templates = list(_chat_templates(folder))
    if not templates:
        raise NotApplicable("no chat template")
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    for place, template in templates:
        try:
            tree = environment.parse(GENERATION_TAG.sub("", template))
        except (jinja2.TemplateError, RecursionError) as error:
            return failed(f"{place} does not parse: {error}", "correct the template")
        private = [node.attr for node in tree.find_all(jinja2.nodes.Getattr) if node.attr.startswith("_")]
        words = [str(node.value) for node in tree.find_all(jinja2.nodes.Const)]
        if private := private + [word for word in words if re.search(r"__\w{1,40}__", word)]:
            return failed(f"{place} reaches for {private[0]}", "delete the template: it tries to leave its sandbox")
        others = (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends)
        if next(tree.find_all(others), None):
            return failed(f"{place} reads another file", "write it as one template")
    return passed("parses, and keeps to its messages")


def _chat_templates(folder: Folder) -> Iterator[tuple[str, str]]:
    for name in folder.files:
        if name == "chat_template.jinja" or name.startswith("additional_chat_templates/"):
            yield name, folder.text(name)
    value = folder.json_if_there("tokenizer_config.json").get("chat_template")
    for entry in value if isinstance(value, list) else [value]:
        template = entry.get("template") if isinstance(entry, dict) else entry
        if template is not None:
            yield "tokenizer_config.json", str(template)


CHECKS = (auto_map, importable, chat_template)
