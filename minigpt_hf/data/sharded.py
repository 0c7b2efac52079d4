"""Arrays whose consecutive parts are in separate files, and the bounded local cache of remote files.

A position is mapped to its part by a binary search over the starts of all parts, so a slice may straddle parts.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import fsspec
import numpy as np
from filelock import FileLock

from ..atomic import DISK_FULL, remove_abandoned, sha256, temporary_directory
from ..errors import DiskFullError, MiniGPTError, UnreadableFileError
from .array_file import ArrayFile

logger = logging.getLogger(__name__)

MAX_OPEN = 64  # files that one array keeps open
COPIED_BYTES = 1 << 22  # read at a time
RETRIED_AFTER = (1, 5, 30, None)  # seconds, if a remote file cannot be read


@dataclass(frozen=True)
class Part:
    """A part of an array.

    Args:
        length: Number of its elements; the file may have more.
        open: Returns the array or file that contains them.
        add: Is added to each element.
    """

    length: int
    open: Callable[[], np.ndarray | ArrayFile]
    add: int = 0


class ShardedArray:
    """A concatenation of parts, of which slices are read. Files are opened when they are first read.

    Args:
        parts: The parts.
        dtype: Type of the elements.
        max_open: Number of files that remain open.
    """

    def __init__(self, parts: Sequence[Part], dtype: np.dtype | str, max_open: int = MAX_OPEN):
        self.dtype, self._parts = np.dtype(dtype), parts
        self._starts = np.concatenate([[0], np.cumsum([part.length for part in parts], dtype=np.int64)])
        self._opened = lru_cache(max_open)(lambda number: parts[number].open())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Read the elements of a slice with step 1.

        Raises:
            UnreadableFileError: if a file has been truncated.
        """
        start, stop, _ = part.indices(len(self))
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            first, last = int(self._starts[number]), int(self._starts[number + 1])
            end = min(stop, last)
            if start < end:
                piece = self._opened(number)[start - first : end - first]
                pieces.append(piece + self.dtype.type(self._parts[number].add) if self._parts[number].add else piece)
            start, number = end, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, self.dtype), *pieces])


@dataclass(frozen=True)
class ShardStore:
    """The files of a merged folder: read in place, or copied to a cache if they are remote.

    Args:
        location: The folder, or its URL.
        files: Size and SHA-256 of each file, by its name in the folder.
        cache: Where remote files are copied to; None for a local folder.
        max_bytes: Maximum size of this cache; at least one file is stored.
    """

    location: str
    files: dict[str, dict]
    cache: Path | None = None
    max_bytes: int = 0
    # Copies that this process has verified.
    verified: set[str] = field(default_factory=set, init=False, compare=False)

    def max_open(self) -> int:
        """Number of files to keep open: those that were removed from the cache occupy space while they are open."""
        if self.cache is None:
            return MAX_OPEN
        return max(1, min(MAX_OPEN, self.max_bytes // max(file["size"] for file in self.files.values())))

    def path(self, name: str) -> Path:
        """Return the path of a file. Remote files are copied as a whole, verified, and kept while there is space.

        Raises:
            MiniGPTError: if the file is not in the manifest, or a remote file cannot be read or has other content.
        """
        if (entry := self.files.get(name)) is None:
            raise MiniGPTError(f"{self.location}: the manifest of its index has no {name!r}; merge the shards again")
        if self.cache is None:
            return Path(self.location) / name
        target = self.cache / str(entry["sha256"])
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / ".lock"):  # one process copies, and those that need the same file wait
            if target.is_file() and self._is_intact(target, entry):
                os.utime(target)  # the least recently used files are removed first
                self._remove_oldest(self.cache, 0, keep=target.name)  # an earlier process may have had a larger cache
                return target
            remove_abandoned(self.cache)
            self._make_room(self.cache, entry["size"])
            with temporary_directory(self.cache) as temporary:
                self._copy(name, entry, temporary / "file")
                (temporary / "file").replace(target)
            self.verified.add(target.name)
        return target

    def _is_intact(self, copy: Path, entry: dict) -> bool:
        """Verify a copy of an earlier process by its content, once."""
        if copy.name not in self.verified:
            if copy.stat().st_size != entry["size"] or sha256(copy) != entry["sha256"]:
                logger.warning("%s: differs from the index and is copied again", copy)
                return False
            self.verified.add(copy.name)
        return copy.stat().st_size == entry["size"]

    def _make_room(self, cache: Path, size: int) -> None:
        self._remove_oldest(cache, size)
        if (free := shutil.disk_usage(cache).free) < size:
            raise DiskFullError(
                f"{cache}: a shard of {size / 1e6:,.1f} MB does not fit, {free / 1e6:,.1f} MB are free; free more "
                "space, specify another folder with --cache_dir, or reduce --shard_cache"
            )

    def _remove_oldest(self, cache: Path, size: int, keep: str | None = None) -> None:
        """Remove the least recently used copies until one of `size` bytes fits into the limit, except the copy `keep`."""
        files = sorted((path for path in cache.iterdir() if path.is_file() and path.name != ".lock"), key=_used)
        total = size + sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self.max_bytes:
                break
            if path.name != keep:
                total -= path.stat().st_size
                path.unlink()

    def _copy(self, name: str, entry: dict, target: Path) -> None:
        url = f"{self.location}/{name}"
        logger.info("%s: copying %s MB to the cache", url, f"{entry['size'] / 1e6:,.1f}")
        for seconds in RETRIED_AFTER:
            digest = hashlib.sha256()
            try:
                with fsspec.open(url, "rb", compression=None) as source, target.open("wb") as copy:
                    while chunk := source.read(COPIED_BYTES):
                        digest.update(chunk)
                        copy.write(chunk)
                break
            except FileNotFoundError as error:
                raise UnreadableFileError(f"{url}: is missing; upload the complete folder") from error
            except Exception as error:  # its type depends on the file system
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if seconds is None:
                    raise UnreadableFileError(f"{url}: cannot be read: {reason}") from error
                logger.warning("%s: cannot be read (%s); repeated in %s s", url, reason, seconds)
                time.sleep(seconds)
        if digest.hexdigest() != entry["sha256"]:
            raise UnreadableFileError(f"{url}: its content differs from the index; upload the folder again")


def _used(path: Path) -> int:
    return path.stat().st_mtime_ns
