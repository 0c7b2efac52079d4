"""One training at a time in a run folder: an advisory lock, released by the operating system when its holder ends.

In: a folder. Out: an exclusive lock, held through the file `.lock` in it, which names the holder. A lock whose holder was
killed is free.
"""

import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from ..errors import MiniGPTError

logger = logging.getLogger(__name__)

LOCK = ".lock"
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
PLACE_ON_WINDOWS = 1 << 30  # beyond the content: locked bytes cannot be read by others there


class FolderLock:
    """An exclusive lock on a folder.

    POSIX record locks (`fcntl.lockf`) work over NFS and are not inherited by forked processes, so no loader worker keeps
    the lock of a dead parent. They are lost when their process closes *any* descriptor of the file: nothing else in this
    package opens `.lock`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / LOCK
        self.descriptor: int | None = None
        self.created: list[Path] = []  # folders that did not exist before

    def acquire(self) -> None:
        """Create the folder if it does not exist, and lock it.

        Raises:
            MiniGPTError: if another process holds the lock, or the folder cannot be written.
        """
        self.created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for _ in range(100):  # another process may remove the file, or a folder it created, between two lines
            self.descriptor = self._open()
            if self.descriptor is None:
                continue
            try:
                _lock(self.descriptor)
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    logger.warning(
                        f"{self.folder}: this file system does not support locks ({error.strerror}); do not start a second "
                        "training there"
                    )
                    return
                holder = self._holder()
                os.close(self.descriptor)
                self.descriptor = None
                self._remove_created()
                if error.errno not in HELD:
                    raise
                raise MiniGPTError(
                    f"--output_dir {self.folder}: another process ({holder}) is training there; wait for it, stop it, or "
                    "name another folder"
                ) from error
            if self._is_current():
                break
            os.close(self.descriptor)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": datetime.now().isoformat(" ", "seconds")}
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps(holder).encode())

    def release(self) -> None:
        """Remove the file, unlock, and remove the folders that `acquire` created, if they are empty."""
        if self.descriptor is None:
            return
        if os.name != "nt" and self._is_current():  # unlinked while it is locked: whoever opened it before looks again
            self.file.unlink()
        os.close(self.descriptor)
        self.descriptor = None
        if os.name == "nt":
            self.file.unlink(missing_ok=True)
        self._remove_created()

    def moved_to(self, folder: Path) -> None:
        """The folder was renamed; the lock is on the file, and so still held."""
        self.folder, self.file, self.created = folder, folder / LOCK, []

    def _open(self) -> int | None:
        """A descriptor of the file; `None` if the folder vanished meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MiniGPTError(f"--output_dir {self.folder}: cannot be created ({error.strerror})") from error
        try:
            return os.open(self.file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._remove_created()
            raise MiniGPTError(
                f"--output_dir {self.folder}: cannot be written ({error.strerror}); make it writable, or name another folder"
            ) from error

    def _is_current(self) -> bool:
        """Whether the path still names the file that is open."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.file.lstat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            holder = json.loads(os.read(self.descriptor, 1000))
            return f"pid {holder['pid']} on host {holder['host']}, started {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "which has not written its name yet"

    def _remove_created(self) -> None:
        for folder in self.created:
            try:
                folder.rmdir()
            except OSError:  # not empty: the run is in it
                break


def _lock(descriptor: int) -> None:
    """Take the lock, or raise `OSError` at once."""
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, PLACE_ON_WINDOWS, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
