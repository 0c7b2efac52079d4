"""Directories that are verified against their manifests when they are opened: cache entries and prepared texts.

Sizes are compared each time a directory is opened. SHA-256 hashes are computed once per state of a file:
`cache_dir/verified/` stores the inode, modification time and change time of every file whose hash was correct. Every write
updates the change time, which programs cannot set.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..atomic import (
    DescribedOSError,
    publish,
    read_manifest,
    remove_abandoned,
    seal,
    sha256,
    storage_error,
    temporary_directory,
)

Content = TypeVar("Content")

logger = logging.getLogger(__name__)

# A file can change twice within one tick of the file system's clock, so states more recent than this are not stored.
TICK_SECONDS = 2
# The state of an entry with a file of at least this size is recorded when it is created, after waiting for one tick.
RECORDED_BYTES = 100_000_000
# A file with the name of the entry: an intact entry under the name of another one would be the text of another source.
NAME = "name"
ANNOUNCED_BYTES = 1_000_000_000  # hashing this much takes a second or more and is logged


def cached(
    directory: Path, write: Callable[[Path], None], read: Callable[[Path], Content], cache_dir: Path, what: str
) -> Content:
    """Return the content of a cache entry, after creating it if it is missing or damaged.

    Several processes may create the same entry concurrently; all use the first result.

    Args:
        directory: The cache entry.
        write: Fills an empty directory.
        read: Returns the content of a verified directory.
        cache_dir: Root of the cache.
        what: Description of the content, for messages.

    Raises:
        OSError: if the cache cannot be written; the message states its folder and what to do.
    """
    remove_abandoned(directory.parent)
    fault = _fault_of_entry(directory, cache_dir)
    if fault is None:
        try:
            return read(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = str(error)
    if directory.exists():
        logger.warning("%s: the cached %s is damaged (%s) and will be rebuilt", directory, what, fault)
    try:
        with temporary_directory(directory.parent) as temporary:
            content = temporary / "content"
            content.mkdir()
            write(content)
            (content / NAME).write_text(directory.name, encoding="utf-8")
            states = _seal_and_record(content)
            while not publish(content, directory):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    if _fault_of_entry(directory, cache_dir) is None:
                        return read(directory)  # another process has created it in the meantime
                with suppress(FileNotFoundError):  # another process is replacing it as well
                    directory.rename(temporary / "damaged")
                shutil.rmtree(temporary / "damaged", ignore_errors=True)
    except Exception as error:
        raise _with_remedy(error, cache_dir, what) from error
    if states:
        _write_record(_record_of(directory, cache_dir), states)
    return read(directory)


def _fault_of_entry(directory: Path, cache_dir: Path) -> str | None:
    """Verify a cache entry; return a description of the first error, or None."""
    if fault := verification_error(directory, cache_dir):
        return fault
    try:
        name = (directory / NAME).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return f"its name cannot be read: {error}"
    return None if name == directory.name else f"it is a copy of the entry {name}"


def _seal_and_record(content: Path) -> dict[str, list]:
    """Seal a directory. Returns the states of its files if one is large, so that the next process does not hash them."""
    files = [file for file in content.rglob("*") if file.is_file()]
    is_large = max((file.stat().st_size for file in files), default=0) >= RECORDED_BYTES
    if is_large:
        changed = max(file.stat().st_ctime for file in files)
        time.sleep(min(max(0, changed + TICK_SECONDS - time.time()), TICK_SECONDS))
    before = {file.relative_to(content).as_posix(): _times(file) for file in files}
    seal(content)
    return {name: [entry["sha256"], *before[name]] for name, entry in read_manifest(content).items() if is_large}


def _with_remedy(error: Exception, cache_dir: Path, what: str) -> Exception:
    """Add a remedy to an error that occurred while writing the cache; return any other error unchanged."""
    number = explained.errno if (explained := storage_error(error, cache_dir)) else None
    if number == errno.ENOSPC:
        remedy = f"{shutil.disk_usage(cache_dir).free / 1e6:,.0f} MB are free; free more space"
    elif number == errno.EFBIG:
        remedy = "raise the file size limit (`ulimit -f`)"
    elif isinstance(error, OSError) and error.filename is not None and Path(error.filename).is_relative_to(cache_dir):
        number, remedy = error.errno, "make it writable"
    else:
        return error
    message = (
        f"{cache_dir}: the {what} cannot be written to this cache ({os.strerror(number or 0)}): {remedy}, or specify"
    )
    return DescribedOSError(number, f"{message} another folder with --cache_dir or, without this option, HF_HOME")


def verification_error(directory: Path, cache_dir: Path) -> str | None:
    """Verify a sealed directory against its manifest; return a description of the first error, or None."""
    record = _record_of(directory, cache_dir)
    try:
        entries = read_manifest(directory)
        sizes = {name: (directory / name).stat().st_size for name in entries}
    except ValueError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(directory)} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    for name, size in sizes.items():
        if size != entries[name]["size"]:
            return f"{name} has {size:,} bytes instead of {entries[name]['size']:,}"
    known, verified = _read_record(record), {}
    unverified = sum(size for name, size in sizes.items() if known.get(name) != _state(directory / name, entries[name]))
    if unverified >= ANNOUNCED_BYTES:
        logger.info("%s: verifying the SHA-256 hashes of %.1f GB", directory, unverified / 1e9)
    for name, entry in entries.items():
        file = directory / name
        state = _state(file, entry)
        if known.get(name) != state:
            if sha256(file) != entry["sha256"]:
                return f"the content of {name} has changed"
            if time.time() - state[-1] / 1e9 < TICK_SECONDS:
                continue
        verified[name] = state
    if verified != known:
        _write_record(record, verified)
    return None


def _record_of(directory: Path, cache_dir: Path) -> Path:
    return cache_dir / "verified" / f"{hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:32]}.json"


def _state(file: Path, entry: dict) -> list:
    return [entry["sha256"], *_times(file)]


def _times(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read_record(record: Path) -> dict[str, list]:
    try:
        known = json.loads(record.read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_record(record: Path, verified: dict[str, list]) -> None:
    """Write atomically. Errors are ignored, because a read-only cache can be used without records."""
    temporary = record.with_name(f"{record.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verified), encoding="utf-8")
        temporary.replace(record)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
