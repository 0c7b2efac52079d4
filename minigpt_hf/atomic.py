"""Directories that are written atomically and can be verified afterwards.

A directory is filled under a temporary name, sealed with a manifest of sizes and SHA-256 sums, forced to disk and renamed
to its place: a process that is killed, or a disk that is full, leaves either no directory or a complete one. Temporary
directories of processes that no longer run can be told apart and removed.

    .minigpt-tmp-XXXXXXXX.lock     locked by the writer from before the directory exists until after it is gone
    .minigpt-tmp-XXXXXXXX/         the temporary directory
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import MiniGPTError

MANIFEST = "manifest.json"
PREFIX = ".minigpt-tmp-"
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # what `rename` answers if the target exists


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """Yield a new empty directory in `parent`; remove it at the end, whatever happened.

    While the block runs, a lock tells other processes, also of other machines that share the file system, that the
    directory is in use; the operating system releases it when the process ends in any way.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, suffix=".lock", dir=parent)
        os.close(descriptor)
        lock = FileLock(name)
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:  # another process took the lock to remove the file, which it found unlocked
            continue
    directory = Path(name.removesuffix(".lock"))
    try:
        directory.mkdir()
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        Path(name).unlink(missing_ok=True)
        lock.release()


def remove_abandoned(parent: Path) -> None:
    """Remove temporary directories in `parent` whose writers no longer run.

    A writer takes its lock before it creates its directory, so a directory whose lock is free has no writer. The lock
    file is unlinked while it is locked, so nobody can lock a file that has been unlinked without noticing. What cannot
    be locked or removed (another user's, a file system without locks) stays.
    """
    for file in parent.glob(f"{PREFIX}*.lock"):
        with suppress(OSError, Timeout, NotImplementedError):
            lock = FileLock(str(file))
            lock.acquire(timeout=0)
            try:
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                file.unlink(missing_ok=True)
            finally:
                lock.release()


def publish(directory: Path, target: Path) -> bool:
    """Rename a sealed directory to `target`; False if something is there already."""
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno in OCCUPIED:
            return False
        raise
    to_disk(target.parent)
    return True


def seal(directory: Path) -> None:
    """Write the manifest, and force every file and directory to disk."""
    entries, manifest = {}, directory / MANIFEST
    for file in sorted(directory.rglob("*")):
        to_disk(file)
        if file.is_file() and file != manifest:
            entries[file.relative_to(directory).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    to_disk(manifest)
    to_disk(directory)


def read_manifest(directory: Path) -> dict[str, dict]:
    """Name -> size and SHA-256 of each file of a sealed directory.

    Raises:
        MiniGPTError: if there is none, or it is damaged.
    """
    try:
        entries = json.loads((directory / MANIFEST).read_bytes())
        for entry in entries.values():
            int(entry["size"]), str(entry["sha256"])
        if not entries:
            raise ValueError
        return entries
    except FileNotFoundError:
        raise MiniGPTError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MiniGPTError(f"{MANIFEST} is damaged ({type(error).__name__})") from None


def sha256(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Force a file, or the names in a directory, from memory to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories, and writes their entries through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(contents: dict[Path, str]) -> None:
    """Replace files atomically: each has its old or its new content, never a part of it.

    All of them are on disk before the first is renamed; they are renamed in the order given.
    """
    for file, content in contents.items():
        temporary_name(file).write_text(content, encoding="utf-8")
        to_disk(temporary_name(file))
    for file in contents:
        temporary_name(file).replace(file)
        to_disk(file.parent)


def temporary_name(file: Path) -> Path:
    """Where `write_files` writes before the rename."""
    return file.with_name(f".{file.name}.unfinished")


def rename_aside(path: Path) -> Path:
    """Rename `path` to `path.aside-1`, `-2`, …, so that nothing is deleted; return the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return path.rename(aside)
