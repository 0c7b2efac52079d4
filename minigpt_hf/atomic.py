"""Atomic writing and verification of directories.

A directory is filled under a temporary name, sealed with a manifest of sizes and SHA-256 hashes, synchronized to disk (fsync)
and renamed: after a kill or on a full disk there is either no directory or a complete one. Temporary directories of processes
that no longer run are recognized by their locks and can be removed.

    .minigpt-tmp-XXXXXXXX.lock     locked by the writer for the lifetime of the temporary directory
    .minigpt-tmp-XXXXXXXX/         the temporary directory
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import MiniGPTError

MANIFEST = "manifest.json"
PREFIX = ".minigpt-tmp-"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TARGET_EXISTS = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # errors of `rename`


def file_size_limit() -> int | None:
    """The size in bytes of the largest file that this process may write; `None` if it is not limited."""
    if os.name == "nt":
        return None
    import resource  # does not exist on Windows

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def storage_error(error: Exception, path: Path) -> OSError | None:
    """Return the error to raise instead of `error` if it means that a disk is full (ENOSPC) or a file too large (EFBIG).

    Libraries in Rust state the cause only in the message, and NumPy only the number of items that were written.

    Args:
        path: What was written.
    """
    number = error.errno if isinstance(error, OSError) else None
    message, limit = str(error), file_size_limit()
    is_short = re.fullmatch(r"\d+ requested and \d+ written", message)
    if number == errno.EFBIG or "File too large" in message or (is_short and limit is not None):
        allowed = "the file system supports"
        if limit is not None:
            allowed = f"the file size limit of this process ({limit:,} bytes, `ulimit -f`)"
        remedy = (
            "specify a folder on another file system" if limit is None else "raise the limit, or specify another folder"
        )
        return DescribedOSError(errno.EFBIG, f"{path}: a file is larger than {allowed}; {remedy}")
    if number in DISK_FULL or "No space left" in message or is_short:
        return DescribedOSError(
            errno.ENOSPC, f"{path}: no space left on this disk; free some space or specify another folder"
        )
    return None


class DescribedOSError(OSError):
    """An `OSError` with a number whose message is complete without it."""

    def __str__(self) -> str:
        return self.args[1]


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """Create an empty directory in `parent` and remove it at the end of the block, also after an exception.

    During the block a file lock marks the directory as in use, also for other machines that share the file system. The
    operating system releases the lock when the process ends for any reason.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, suffix=".lock", dir=parent)
        os.close(descriptor)
        lock = FileLock(name)
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:  # another process found the new file unlocked and is removing it
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

    A writer acquires its lock before it creates its directory, so a directory whose lock is free has no writer. The lock file
    is unlinked while it is locked, so no other process can acquire a lock that has been unlinked. Directories that cannot be
    locked or removed, e.g. those of another user, are left in place.
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `folder` after the block: it is synchronized to disk and renamed.

    If the block raises an exception, nothing remains, and folders created above `folder` are removed. Temporary directories
    next to it whose writers no longer run are removed first.

    Raises:
        MiniGPTError: if `folder` exists or cannot be created.
        OSError: if it cannot be written.
    """
    check_new_folder(folder)
    created = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        remove_abandoned(folder.parent)
        with temporary_directory(folder.parent) as temporary:
            content = temporary / "content"
            content.mkdir()
            yield content
            for path in (*content.rglob("*"), content):
                fsync(path)
            if not publish(content, folder):
                raise _already_exists(folder)  # another process has created it in the meantime
    except BaseException as error:
        for parent in created:  # innermost first
            with suppress(OSError):  # another process may be using it
                parent.rmdir()
        if isinstance(error, Exception) and (explained := storage_error(error, folder)):
            raise explained from error
        raise


def check_new_folder(folder: Path) -> None:
    """Check that a folder does not exist and that its path has no dangling symbolic link.

    Raises:
        MiniGPTError: otherwise.
    """
    check_links(folder)
    if folder.exists():
        raise _already_exists(folder)


def _already_exists(folder: Path) -> MiniGPTError:
    return MiniGPTError(f"{folder}: already exists; remove it, or give another folder")


def check_links(folder: Path) -> None:
    """Check that neither a folder nor a folder above it is a dangling symbolic link.

    Raises:
        MiniGPTError: otherwise; `mkdir` would fail because the link exists.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise MiniGPTError(
                f"{folder}: cannot be created, because {path} is a symbolic link to {path.readlink()}, which does not exist; "
                "create that folder, or give another one"
            )


def publish(directory: Path, target: Path) -> bool:
    """Rename a sealed directory to `target`; return False if `target` exists."""
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno in TARGET_EXISTS:
            return False
        raise
    fsync(target.parent)
    return True


def seal(directory: Path) -> None:
    """Write the manifest of a directory, and synchronize all its files and subdirectories to disk."""
    entries, manifest = {}, directory / MANIFEST
    for file in sorted(directory.rglob("*")):
        fsync(file)
        if file.is_file() and file != manifest:
            entries[file.relative_to(directory).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    fsync(manifest)
    fsync(directory)


def read_manifest(directory: Path) -> dict[str, dict]:
    """Return {file name: {"size": bytes, "sha256": hexadecimal digits}} of a sealed directory.

    Raises:
        MiniGPTError: if the manifest is missing or damaged.
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
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Synchronize a file's content, or a directory's entries, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories for `fsync`
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(contents: dict[Path, str] | dict[Path, bytes]) -> None:
    """Replace files atomically: each has its old or its new content, never a part of it.

    All of them are on disk before the first is renamed; they are renamed in the order given.

    Raises:
        OSError: if one cannot be written; all files have their old content.
    """
    try:
        for file, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            temporary_name(file).write_bytes(data)
            fsync(temporary_name(file))
    except OSError as error:
        for written in contents:
            temporary_name(written).unlink(missing_ok=True)
        raise storage_error(error, file) or OSError(error.errno, error.strerror, str(file)) from error
    for file in contents:
        temporary_name(file).replace(file)
        fsync(file.parent)


def temporary_name(file: Path) -> Path:
    """Return the path to which `write_files` writes before it renames it to `file`."""
    return file.with_name(f".{file.name}.unfinished")


def rename_aside(path: Path) -> Path:
    """Rename `path` to `path.aside-1`, `-2`, …, so that nothing is deleted; return the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return path.rename(aside)
