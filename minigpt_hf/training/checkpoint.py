"""Atomic, verified checkpoints.

1. *Write.* All files are written into `.unfinished/checkpoint-N/`; existing checkpoints are not touched.
2. *Seal.* `manifest.json` lists the size and SHA-256 of every file; each file and the directory are fsynced.
3. *Rename.* One rename, atomic on POSIX file systems, makes it `checkpoint-N/`; the parent directory is fsynced.
4. *Resume.* Checkpoints are verified against their manifests, newest first. An invalid one is renamed, never deleted.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..atomic import MANIFEST, fsync, rename_aside, seal, sha256
from .run_folder import CHECKPOINT, FINGERPRINT, RunFolder, read_json


@contextmanager
def atomic_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """Yield a folder to fill. If the block ends without an exception, the folder is sealed and renamed to `checkpoint`."""
    folder = staging_folder(checkpoint)
    shutil.rmtree(folder.parent, ignore_errors=True)  # left by a killed process
    folder.parent.mkdir()  # fails if the run folder was removed: a checkpoint alone could not be resumed
    folder.mkdir()
    try:
        yield folder
        seal(folder)
        if checkpoint.exists():  # of the run before it was resumed from an earlier checkpoint
            rename_aside(checkpoint)
        folder.rename(checkpoint)
        fsync(checkpoint.parent)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def staging_folder(checkpoint: Path) -> Path:
    """Folder in which a checkpoint is written before it is renamed."""
    return checkpoint.parent / ".unfinished" / checkpoint.name


def verification_error(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest. Returns a description of the first difference, or `None` if it is valid."""
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
    if needed := {config, "trainer_state.json", "optimizer.pt", "scheduler.pt", FINGERPRINT} - set(entries):
        return f"{', '.join(sorted(needed))} not in {MANIFEST}"
    name = CHECKPOINT.fullmatch(checkpoint.name)  # a copy may have any other name
    if name and (step := read_json(checkpoint / "trainer_state.json")["global_step"]) != int(name[1]):
        return f"it was saved at step {step:,}"
    return None


def is_of_run(checkpoint: Path, log_history: list[dict[str, Any]]) -> bool:
    """Whether a valid checkpoint belongs to the run with these log rows: it has logged the same losses at the same steps."""

    def losses(rows: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
        return {(name, row["step"]): repr(row[name]) for row in rows for name in ("loss", "eval_loss") if name in row}

    logged, expected = losses(read_json(checkpoint / "trainer_state.json")["log_history"]), losses(log_history)
    return all(logged[key] == expected[key] for key in logged.keys() & expected.keys())


def remove_old_checkpoints(run: RunFolder, limit: int | None, newest: Path, best: Path | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but not `newest`, `best` or symbolic links.

    transformers' `rotate_checkpoints` would also delete folders such as `checkpoint-10-old` and `checkpoint-6.aside-1`.
    """
    if not limit:
        return
    protected = {newest} | ({best} if best else set())
    found = [path for path in run.checkpoints() if not path.is_symlink()]
    old = [path for path in found if path not in protected]
    for path in old[: max(0, len(found) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


def newest_valid(run: RunFolder) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint. Newer ones, which are invalid, are renamed.

    Returns:
        The checkpoint, or `None` if no checkpoint is valid; and a message for each renamed one.
    """
    messages: list[str] = []
    for checkpoint in reversed(run.checkpoints()):
        fault = verification_error(checkpoint)
        if fault is None:
            return checkpoint, messages
        messages.append(f"{checkpoint.name} is invalid ({fault}); renamed to {rename_aside(checkpoint).name}")
    return None, messages


def best_checkpoint(
    runs: list[Path], log_history: list[dict[str, Any]], metric: str, greater_is_better: bool
) -> tuple[int, float, Path] | None:
    """Find the best valid checkpoint of a run by a metric; the earliest of equals.

    Args:
        runs: Run folders in which to look, in this order.
        log_history: The Trainer's log rows.

    Returns:
        Step, value of the metric and folder; `None` if no evaluated checkpoint of this run is valid.
    """
    found: dict[int, tuple[float, Path]] = {}
    for row in log_history:
        for run in map(RunFolder, runs):
            if math.isfinite(row.get(metric, math.nan)) and run.checkpoint(row["step"]).is_dir():
                found.setdefault(row["step"], (row[metric], run.checkpoint(row["step"])))
    order = sorted(found, key=lambda step: (found[step][0] * (-1 if greater_is_better else 1), step))
    valid = (
        step for step in order if verification_error(found[step][1]) is None and is_of_run(found[step][1], log_history)
    )
    step = next(valid, None)
    return None if step is None else (step, *found[step])
