"""An array in a file, of which slices are read."""

import os
import weakref
from pathlib import Path

import numpy as np

from ..errors import UnreadableFileError


class ArrayFile:
    """A one-dimensional array in a file, of which slices are read into memory.

    In contrast to a memory map, the pages read do not count as memory of this process, and a file that is truncated leads to
    an exception instead of the signal SIGBUS. Forked processes may read concurrently.

    Args:
        file: The file.
        dtype: Type of the elements.
        offset: Position of the first element in bytes.
    """

    def __init__(self, file: Path, dtype: np.dtype | str, offset: int = 0):
        self.file, self.dtype, self.offset = file, np.dtype(dtype), offset
        self._descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._length = (os.fstat(self._descriptor).st_size - offset) // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Read the elements of a slice with step 1.

        Raises:
            UnreadableFileError: if the file has been truncated.
        """
        start, stop, _ = part.indices(self._length)
        size, position = max(0, stop - start) * self.dtype.itemsize, self.offset + start * self.dtype.itemsize
        content = self._read(size, position)
        while len(content) < size:  # a single call reads at most 2 GiB
            if not (more := self._read(size - len(content), position + len(content))):
                raise UnreadableFileError(
                    f"{self.file}: was truncated while it was in use; run the same command again, which verifies it"
                )
            content += more
        return np.frombuffer(content, self.dtype)

    def _read(self, size: int, position: int) -> bytes:
        if os.name == "nt":  # Windows has no `pread`
            os.lseek(self._descriptor, position, os.SEEK_SET)
            return os.read(self._descriptor, size)
        return os.pread(self._descriptor, size, position)
