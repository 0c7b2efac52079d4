"""A folder -> a table of what is right and wrong with it, for MiniGPT folders, their native twins and, as far as it goes,
any causal language model.

In: a folder. Out: rows, each with a reason and a remedy. It refuses what is no folder. It never unpickles, never opens what
lies outside, believes no size that a file claims, and runs no code of the folder unless that is trusted; then it does so in
a process of its own with a time limit.

Each room here looks at one subject. What is imported inside functions is so because the processes that this room starts
import it, too, and have no need of it.
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
    "fingerprint",
)
MEMORY = 4 << 30  # bytes: ample for a tokenizer
LOADS = ("loads natively", "loads with the package", "tokenizer loads")
OWN_CODE = "loads without the package"
BEHAVIOUR = ("meta load = plain load", "cached = uncached", "left-padded = single", "beams", "stops at the end")
# What has to hold before a loader may touch the folder: with these, nothing leads it out of the folder or into a bomb.
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
    """Every row about a folder.

    Args:
        trust_remote_code: Run the folder's own code, in a process with a time limit. That process is no sandbox: it can
            do what its user can.

    Raises:
        ValueError: if there is no such folder.
    """
    found = examine_files(folder)
    return found + _loading(Folder(folder), {row.name for row in failures(found)}, trust_remote_code)


def examine_files(folder: str | Path) -> list[Row]:
    """The rows for which no model has to be loaded."""
    from . import card, child, code, config, files, weights

    patient = Folder(folder)
    rows = [check(patient) for room in (files, config, code, weights) for check in room.CHECKS]
    rows += child.rows_of("tokenizer", patient.path, TOKENIZER, 120, MEMORY)
    return rows + [check(patient) for check in card.CHECKS]


def failures(rows: list[Row]) -> list[Row]:
    """Those that failed: empty for a folder in order."""
    return [row for row in rows if row.state == "fail"]


def _loading(folder: Folder, failed: set[str], trust_remote_code: bool) -> list[Row]:
    from . import child
    from .code import references

    names = (*LOADS, OWN_CODE, *BEHAVIOUR)
    if broken := [name for name in BEFORE_LOADING if name in failed]:
        return [Row(name, "not applicable", f"not loaded, because of the row `{broken[0]}`") for name in names]
    if not references(folder):
        own = Row(OWN_CODE, "not applicable", "the folder brings no code of its own")
    elif not trust_remote_code:
        own = Row(OWN_CODE, "not applicable", "its code is run only with --trust-remote-code")
    elif "code" in failed:
        own = Row(OWN_CODE, "not applicable", "not run, because of the row `code`")
    else:
        own = None
    held = sum(folder.files.values())
    seconds = 600 + 60 * held / (1 << 30)  # idle, starting takes some ten; a GiB takes more on a slow disk
    memory = 2 * MEMORY + 16 * held  # two models in float32, of weights that may have half a byte each
    if own is None:  # then behaviour is that of the folder's own code
        rows = child.rows_of("loading", folder.path, LOADS, seconds, memory, "loads")
        return rows + child.rows_of("loading", folder.path, (OWN_CODE, *BEHAVIOUR), seconds, memory, "own")
    rows = child.rows_of("loading", folder.path, (*LOADS, *BEHAVIOUR), seconds, memory, "package")
    return [*rows[: len(LOADS)], own, *rows[len(LOADS) :]]
