"""Check a model folder: MiniGPT folders, their native twins and, as far as possible, any causal language model.

Each module checks one subject; every check returns a `Row` with a reason and, if it failed, a remedy. No pickle is loaded,
no file outside the folder is opened, sizes claimed by a file are verified before they are used, and code of the folder is
executed only if it is trusted, in a separate process with a time limit.

Some imports are inside functions because the subprocesses import this package, too, and do not need them.
"""

from pathlib import Path

from .folder import Folder
from .row import Row

__all__ = ["Row", "examine", "examine_files", "failures"]

TOKENIZER = (
    "tokenizer",
    "tokenizer round trip",
    "vocabulary",
    "special tokens",
    "end of text",
    "chat format",
    "fingerprint",
)
MEMORY = 4 << 30  # bytes; more than any tokenizer needs
LOADS = ("loads natively", "loads with the package", "tokenizer loads")
OWN_CODE = "loads without the package"
BEHAVIOUR = ("meta load = plain load", "cached = uncached", "left-padded = single", "beams", "stops at the end")
# Checks that must pass before the model is loaded: they exclude files outside the folder and excessive allocations.
BEFORE_LOADING = (
    "no link",
    "files readable",
    "config",
    "settings stay inside",
    "generation config",
    "auto_map",
    "weights header",
    "weights index",
    "tensors",
    "tokenizer",
)


def examine(folder: str | Path, trust_remote_code: bool = False) -> list[Row]:
    """Run all checks of a folder.

    Args:
        trust_remote_code: Execute the Python code of the folder, in a process with a time limit. The process is not a
            sandbox: it has the permissions of the user.

    Raises:
        ValueError: if there is no such folder, or it cannot be a model folder.
    """
    found = examine_files(folder)
    return found + _loading(Folder(folder), {row.name for row in failures(found)}, trust_remote_code)


def examine_files(folder: str | Path) -> list[Row]:
    """Run the checks that do not load the model."""
    from . import card, child, code, config, files, weights

    checked = Folder(folder)
    rows = [check(checked) for module in (files, config, code, weights) for check in module.CHECKS]
    rows += child.rows_of("tokenizer", checked.path, TOKENIZER, 120, MEMORY)
    return rows + [check(checked) for check in card.CHECKS]


def failures(rows: list[Row]) -> list[Row]:
    """The rows of failed checks."""
    return [row for row in rows if row.state == "fail"]


def _loading(folder: Folder, failed: set[str], trust_remote_code: bool) -> list[Row]:
    from . import child
    from .code import references

    names = (*LOADS, OWN_CODE, *BEHAVIOUR)
    if broken := [name for name in BEFORE_LOADING if name in failed]:
        return [Row(name, "not applicable", f"not loaded, because `{broken[0]}` failed") for name in names]
    if not references(folder):
        own = Row(OWN_CODE, "not applicable", "the folder contains no code")
    elif not trust_remote_code:
        own = Row(OWN_CODE, "not applicable", "its code is executed only with --trust-remote-code")
    elif "code" in failed:
        own = Row(OWN_CODE, "not applicable", "not executed, because `code` failed")
    else:
        own = None
    size = sum(folder.files.values())
    seconds = 600 + 60 * size / (1 << 30)  # imports take about 10 s on an idle machine; 60 s per GiB for a slow disk
    memory = 2 * MEMORY + 16 * size  # two float32 models; stored weights may be quantized to half a byte
    if own is None:  # the behavior of the folder's code is checked
        rows = child.rows_of("loading", folder.path, LOADS, seconds, memory, "loads")
        return rows + child.rows_of("loading", folder.path, (OWN_CODE, *BEHAVIOUR), seconds, memory, "own")
    rows = child.rows_of("loading", folder.path, (*LOADS, *BEHAVIOUR), seconds, memory, "package")
    return [*rows[: len(LOADS)], own, *rows[len(LOADS) :]]
