"""Checks of the Python code and chat templates of a folder, by parsing only.

transformers copies a module, and the modules that it imports with `from .name import …`, into a cache and executes it
there. Therefore code must be in Python files at the top of the folder, and `auto_map` must name their classes.
"""

import ast
import re
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import jinja2

from .files import CODE
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
# The pattern with which transformers finds imports: line by line, including docstrings.
SCANNED = re.compile(
    r"^[^\S\n]*import\s{1,99}\.(\S{1,99})[^\S\n]*$|^[^\S\n]*from\s{1,99}\.(\S{1,99})\s{1,99}import", re.M
)
# Characters that change the direction of text, with which code can look different from what it does (CVE-2021-42574).
BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # an extension of transformers


def references(folder: Folder) -> dict[str, str]:
    """All classes that settings make a loader import: {name of the setting: "module.Class"}."""
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
        raise NotApplicable("the folder contains no code")
    own = config.get("auto_map")
    if absent := [name for name in wanted if not isinstance(own, dict) or name not in own]:
        return failed(f"no entry for {some(absent, 6)}", "restore `auto_map` from the original folder")
    faults = [
        f"{place} is {entry!r}, {fault}" for place, entry in named.items() if (fault := _reference_fault(folder, entry))
    ]
    if faults:
        return failed(some(faults), "use `module.Class` with a module of the folder")
    return passed(f"{len(named)} entries, all defined in the folder")


def _reference_fault(folder: Folder, entry: str) -> str:
    """The fault of a reference, or an empty string if it names a class of a module in the folder."""
    if "--" in entry:
        return "code of another repository"
    match = REFERENCE.fullmatch(entry)
    if match is None:
        return "not of the form module.Class"
    if f"{match[1]}.py" not in folder.files:
        return f"but there is no {match[1]}.py"
    try:
        defined = {node.name for node in _tree(folder, f"{match[1]}.py").body if isinstance(node, ast.ClassDef)}
    except (SyntaxError, Unreadable):
        return ""  # reported by the check `code`
    return "" if match[2] in defined else f"but {match[1]}.py does not define this class"


@check("code")
def importable(folder: Folder) -> Row:
    """All modules of `auto_map`, and the modules they import."""
    modules = {match[1] for entry in references(folder).values() if (match := REFERENCE.fullmatch(entry))}
    queue = sorted(f"{module}.py" for module in modules if f"{module}.py" in folder.files)
    if not queue:
        raise NotApplicable("the folder contains no code")
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
                return failed(f"{name}: {fault}", "import files of the folder with `from .name import …`")
            if module not in seen and module not in queue:
                queue.append(module)
    return passed(f"{some(sorted(seen))}: parsed, not executed")


def _tree(folder: Folder, name: str) -> ast.Module:
    return _parse(name, folder.text(name))


@lru_cache(maxsize=16)
def _parse(name: str, text: str) -> ast.Module:
    if match := BIDIRECTIONAL.search(text):
        raise SyntaxError(
            f"a character that changes the direction of text ({plain(match[0])})", (name, None, None, None)
        )
    with warnings.catch_warnings():
        for category in (SyntaxWarning, DeprecationWarning):  # e.g. invalid escape sequences, which are not errors
            warnings.simplefilter("ignore", category)
        try:
            return ast.parse(text)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(f"cannot be parsed ({error})", (name, None, None, None)) from error


def _imports(folder: Folder, name: str) -> Iterator[tuple[str, str]]:
    """Yield (imported file of the folder, fault or "") for each import that is relative or cannot be resolved."""
    tree = _tree(folder, name)
    unconditional = set(map(id, tree.body))  # imports inside `if`, `try` or functions are optional
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            spelled = f"from {'.' * node.level}{node.module or ''} import …"
            if node.level > 1 or not node.module or "." in node.module:
                yield "", f"line {node.lineno}: `{spelled}` does not name a module of the folder"
            elif f"{node.module}.py" not in folder.files:
                yield "", f"line {node.lineno}: `{spelled}`, and there is no {node.module}.py"
            else:
                yield f"{node.module}.py", ""
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for package in {module.split(".")[0] for module in modules}:
                if package == "minigpt_hf" and name in CODE:
                    yield "", f"line {node.lineno}: imports minigpt_hf, which is not available as remote code"
                elif id(node) in unconditional and package not in sys.stdlib_module_names and not find_spec(package):
                    yield "", f"line {node.lineno}: imports {package}, which is not installed"
    for module in {direct or source for direct, source in SCANNED.findall(folder.text(name))}:
        if f"{module}.py" not in folder.files:
            yield "", f"transformers parses one of its lines as an import of `.{module}`, which does not exist"


@check("chat template")
def chat_template(folder: Folder) -> Row:
    """A chat template is a program: it must parse, and access nothing but its inputs."""
    templates = list(chat_templates(folder))
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
            return failed(f"{place} accesses {private[0]}", "delete the template: it tries to escape the sandbox")
        others = (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends)
        if next(tree.find_all(others), None):
            return failed(f"{place} reads another file", "merge the files into one template")
    return passed("parses, and accesses no private attribute or other file")


def chat_templates(folder: Folder) -> Iterator[tuple[str, str]]:
    for name in folder.files:
        if name == "chat_template.jinja" or name.startswith("additionalchat_templates/"):
            yield name, folder.text(name)
    value = folder.json_if_there("tokenizer_config.json").get("chat_template")
    for entry in value if isinstance(value, list) else [value]:
        template = entry.get("template") if isinstance(entry, dict) else entry
        if template is not None:
            yield "tokenizer_config.json", str(template)


CHECKS = (auto_map, importable, chat_template)
