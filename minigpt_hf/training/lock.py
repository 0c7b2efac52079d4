"""An advisory lock on a run folder, which prevents two processes from training in it at the same time.

The lock is on the file `.lock` in the folder, which contains the process id and host of the holder. The operating system
releases it when the process ends for any reason.
"""

import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from transformers import TrainerCallback

from ..atomic import storage_error
from ..errors import MiniGPTError, StorageError

logger = logging.getLogger(__name__)

LOCK = ".lock"
HELD_ERRORS = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
UNSUPPORTED_ERRORS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Position of the locked byte: beyond the content, because other processes cannot read it on Windows.
WINDOWS_OFFSET = 1 << 30


class FolderLock:
    """An exclusive lock on a folder.

    POSIX record locks (`fcntl.lockf`) work over NFS and are not inherited by forked processes, so a DataLoader worker cannot
    hold the lock of a dead parent. A process loses them when it closes *any* descriptor of the file, so nothing else in this
    package may open `.lock`.

    Args:
        folder: The folder to lock; created by `acquire` if it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / LOCK
        self.descriptor: int | None = None
        self.created: list[Path] = []  # folders created by `acquire`

    def acquire(self) -> None:
        """Create the folder if it does not exist, and lock it.

        Raises:
            MiniGPTError: if another process holds the lock, or the folder cannot be written.
        """
        self.created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for _ in range(100):  # another process may remove the file or the folder between two calls
            self.descriptor = self._open()
            if self.descriptor is None:
                continue
            try:
                _lock(self.descriptor)
            except OSError as error:
                if error.errno in UNSUPPORTED_ERRORS:
                    logger.warning(
                        f"{self.folder}: this file system does not support locks ({error.strerror}); do not start another "
                        "run in this folder"
                    )
                    return
                holder = self._holder()
                os.close(self.descriptor)
                self.descriptor = None
                self._remove_created()
                if error.errno not in HELD_ERRORS:
                    raise
                raise MiniGPTError(
                    f"output_dir {self.folder}: another process ({holder}) is training in this folder; wait for it, stop "
                    "it, or use another folder"
                ) from error
            if self._is_current():
                break
            os.close(self.descriptor)
        started = datetime.now().isoformat(" ", "seconds")
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        assert self.descriptor is not None
        try:
            os.ftruncate(self.descriptor, 0)
            os.write(self.descriptor, content.encode())
        except OSError as error:
            if full := storage_error(error, self.folder):
                raise full from error
            raise

    def release(self) -> None:
        """Remove the lock file, unlock, and remove the folders created by `acquire` that are empty."""
        if self.descriptor is None:
            return
        if os.name != "nt" and self._is_current():  # unlinked while locked; `acquire` detects this
            self.file.unlink()
        os.close(self.descriptor)
        self.descriptor = None
        if os.name == "nt":
            self.file.unlink(missing_ok=True)
        self._remove_created()

    def check(self) -> None:
        """Check that the folder at the path is the locked one: another one may belong to another process.

        Raises:
            StorageError: if not.
        """
        if self.descriptor is not None and self.folder.is_dir() and not self._is_current():
            raise StorageError(
                f"output_dir {self.folder}: the folder or its file {LOCK} was moved, removed or replaced during the run; "
                "nothing more is written there; if it was moved, move it back, and run the same command again to resume"
            )

    def moved_to(self, folder: Path) -> None:
        """Update the path after the folder was renamed. The lock is on the file, so it is still held."""
        self.folder, self.file, self.created = folder, folder / LOCK, []

    def _open(self) -> int | None:
        """Open the lock file; return `None` if the folder was removed in the meantime."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MiniGPTError(f"output_dir {self.folder}: cannot be created ({error.strerror})") from error
        try:
            return os.open(self.file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._remove_created()
            raise MiniGPTError(
                f"output_dir {self.folder}: cannot be written ({error.strerror}); make it writable, or use another folder"
            ) from error

    def _is_current(self) -> bool:
        """Whether the path still refers to the open file."""
        try:
            assert self.descriptor is not None
            return os.path.samestat(os.fstat(self.descriptor), self.file.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _holder(self) -> str:
        try:
            assert self.descriptor is not None
            holder = json.loads(os.read(self.descriptor, 1000))
            return f"pid {holder['pid']} on host {holder['host']}, started {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "unknown, because it has just started"

    def _remove_created(self) -> None:
        for folder in self.created:
            try:
                folder.rmdir()
            except OSError:  # not empty: it contains a run
                break


class LockCheck(TrainerCallback):
    """Ends a run whose folder was moved or removed, before it writes to another folder at the same path."""

    def __init__(self, lock: FolderLock):
        self.lock = lock

    def on_step_end(self, args, state, control, **kwargs):
        self.lock.check()

    def on_log(self, args, state, control, **kwargs):
        self.lock.check()

    def on_evaluate(self, args, state, control, **kwargs):
        self.lock.check()


def _lock(descriptor: int) -> None:
    """Acquire the lock, or raise `OSError` without waiting."""
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, WINDOWS_OFFSET, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # exists on Windows only
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
