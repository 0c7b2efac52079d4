"""Sealed directories that are verified when they are opened: entries of the cache, and prepared texts.

Sizes are compared at every start. SHA-256 sums are computed once for each state of a file: `cache_dir/verified/` remembers
inode, size, modification and change time of files whose sum was right. Any write changes the change time, which programs
cannot set.
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

from ..atomic import publish, read_manifest, remove_abandoned, seal, sha256, temporary_directory

Content = TypeVar("Content")

logger = logging.getLogger(__name__)

# A file may change twice within one tick of its file system's clock, so a state so young is not remembered.
TICK_SECONDS = 2
ANNOUNCED_BYTES = 1_000_000_000  # hashing takes a second or more: say so


def cached(
    directory: Path, write: Callable[[Path], None], read: Callable[[Path], Content], cache_dir: Path, what: str
) -> Content:
    """Return the content of a directory of the cache, after creating it if it is missing or damaged.

    Several processes may create the same one at once; the first result is used by all.

    Args:
        write: Fills an empty directory.
        read: Returns the content of one that has been verified.
        cache_dir: Root of the cache.
        what: Name of the content, for messages.

    Raises:
        OSError: if the cache cannot be written; the message names its folder and the remedy.
    """
    remove_abandoned(directory.parent)
    fault = damage(directory, cache_dir)
    if fault is None:
        try:
            return read(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = str(error)
    if directory.exists():
        logger.warning("%s: the cached %s is damaged (%s); it is rebuilt", directory, what, fault)
    try:
        with temporary_directory(directory.parent) as temporary:
            content = temporary / "content"
            content.mkdir()
            write(content)
            seal(content)
            while not publish(content, directory):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    if damage(directory, cache_dir) is None:
                        return read(directory)  # another process was faster
                with suppress(FileNotFoundError):  # or another process is replacing it, too
                    directory.rename(temporary / "damaged")
                shutil.rmtree(temporary / "damaged", ignore_errors=True)
    except OSError as error:
        raise _with_remedy(error, cache_dir, what) from error
    return read(directory)


def _with_remedy(error: OSError, cache_dir: Path, what: str) -> OSError:
    """An error of writing the cache, with what to do; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"{shutil.disk_usage(cache_dir).free / 1e6:,.0f} MB are free; free more"
    elif error.filename is not None and Path(error.filename).is_relative_to(cache_dir):
        remedy = "make it writable"
    else:
        return error
    message = (
        f"{cache_dir}: the {what} cannot be written to this cache ({error.strerror}): {remedy}, or name another folder"
    )
    return OSError(error.errno, f"{message} with --cache_dir")


def damage(directory: Path, cache_dir: Path) -> str | None:
    """Compare a sealed directory with its manifest; None if every byte is as written."""
    memory = cache_dir / "verified" / f"{hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:32]}.json"
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
    known, verified = _remembered(memory), {}
    unknown = sum(size for name, size in sizes.items() if known.get(name) != _state(directory / name, entries[name]))
    if unknown >= ANNOUNCED_BYTES:
        logger.info("%s: verifying %.1f GB against their SHA-256 sums", directory, unknown / 1e9)
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
        _remember(memory, verified)
    return None


def _state(file: Path, entry: dict) -> list:
    status = file.stat()
    return [entry["sha256"], status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _remembered(memory: Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(memory: Path, verified: dict[str, list]) -> None:
    """Written by rename, so that no process reads half of it. A cache that cannot be written remembers nothing."""
    temporary = memory.with_name(f"{memory.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verified), encoding="utf-8")
        temporary.replace(memory)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
