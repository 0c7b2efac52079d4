"""What a checkpoint promises: it is whole or it is not there, it is verified before it is used, and it is exact.

In: a folder that the Trainer fills. Out: `checkpoint-N/` with a manifest; or, when a run goes on, the newest checkpoint
that is still what was written. It refuses a checkpoint in which any byte differs, and never deletes one for it.

Why the promises hold, in the order of events:

1. *Write.* Everything goes into `.unfinished/checkpoint-N/`. Whatever happens there, no checkpoint is touched.
2. *Seal.* `manifest.json` lists the size and SHA-256 of every file; each file and the folder are forced to disk.
3. *Rename.* One rename, atomic on POSIX file systems, makes it `checkpoint-N/`; the parent folder is forced to disk.
4. *Resume.* Checkpoints are verified against their manifests, newest first. A broken one is renamed, not deleted.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..atomic import MANIFEST, fsync, seal, sha256

FINGERPRINT = "fingerprint.json"
DESCRIBED = "described"  # entry of a fingerprint: names and sizes for messages, no part of the comparison


@contextmanager
def whole_or_absent(checkpoint: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends without an error, it becomes `checkpoint`, sealed."""
    folder = unfinished(checkpoint)
    shutil.rmtree(folder.parent, ignore_errors=True)  # what a killed run left
    folder.parent.mkdir()  # fails if the run folder was removed: a checkpoint alone could not be resumed
    folder.mkdir()
    try:
        yield folder
        seal(folder)
        if checkpoint.exists():  # a run that went back to an earlier checkpoint writes this one again
            set_aside(checkpoint)
        folder.rename(checkpoint)
        fsync(checkpoint.parent)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def unfinished(checkpoint: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return checkpoint.parent / ".unfinished" / checkpoint.name


def what_is_wrong(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest; `None` if every byte is as it was written."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in entries.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {entry['size']:,}"
            if sha256(file) != entry["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    config = "adapter_config.json" if "adapter_config.json" in entries else "config.json"
    needed = {config, "trainer_state.json", "optimizer.pt", "scheduler.pt", FINGERPRINT} - set(entries)
    return f"{', '.join(sorted(needed))} not in {MANIFEST}" if needed else None


def checkpoints(run: Path) -> list[Path]:
    """`checkpoint-N` folders of a run, by step in ascending order; `checkpoint-10-old` and `checkpoint-010` are not ours."""
    steps = {path: re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name) for path in run.glob("checkpoint-*")}
    return sorted(
        (path for path, step in steps.items() if step and path.is_dir()), key=lambda path: int(steps[path][1])
    )


def remove_old_checkpoints(run: Path, limit: int | None, newest: Path, best: Path | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; never `newest`, `best`, a link, or any other folder.

    transformers' `rotate_checkpoints` also counts and deletes `checkpoint-10-old` and `checkpoint-6.aside-1`.
    """
    if not limit:
        return
    kept = {newest} | ({best} if best else set())
    found = [path for path in checkpoints(run) if not path.is_symlink()]
    old = [path for path in found if path not in kept]
    for path in old[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line about each broken one that was set aside on the way to it."""
    lines = []
    for checkpoint in reversed(checkpoints(run)):
        fault = what_is_wrong(checkpoint)
        if fault is None:
            return checkpoint, lines
        kept = set_aside(checkpoint)
        lines.append(f"{checkpoint.name} is broken ({fault}); it is kept as {kept.name}")
    return None, lines


def set_aside(path: Path) -> Path:
    """Rename `path` to `path.aside-1`, `-2`, …: nothing is deleted."""
    number = 1
    while (kept := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return path.rename(kept)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of two fingerprints that differ: name -> (old, new)."""
    names = sorted({*old, *new} - {DESCRIBED})
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def write_atomically(contents: dict[Path, str]) -> None:
    """Write files by temporary files, fsync and rename: each is the old one or the new one, never a part of it.

    All of them are on disk before the first is renamed; they are renamed in the order given.
    """
    for file, content in contents.items():
        temporary(file).write_text(content, encoding="utf-8")
        fsync(temporary(file))
    for file in contents:
        temporary(file).replace(file)
        fsync(file.parent)


def temporary(file: Path) -> Path:
    """Where a file lies until it is complete."""
    return file.with_name(f".{file.name}.unfinished")
