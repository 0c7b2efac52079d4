"""Arrays with an entry per document, which may exceed memory: computed in blocks, and stored in a temporary file if large."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

BLOCK = 100_000  # entries that are processed at a time
STORED_BYTES = 1 << 26  # arrays of at least this size are stored in a file


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield consecutive slices of an array."""
    for start in range(0, len(array), BLOCK):
        yield array[start : start + BLOCK]


def stored(parts: Iterable[np.ndarray], length: int, dtype: np.dtype, folder: Path | None) -> np.ndarray:
    """Concatenate arrays.

    Args:
        parts: Arrays of `length` entries in total.
        folder: Where a temporary file is created if the result is large; it has no name and exists as long as the result.

    Returns:
        An array in memory, or a memory-mapped one, whose pages the operating system can remove from memory.
    """
    if length * dtype.itemsize < STORED_BYTES:
        return np.concatenate([np.empty(0, dtype), *parts])
    writable = folder is not None and folder.is_dir() and os.access(folder, os.W_OK)
    with tempfile.TemporaryFile(dir=folder if writable else None) as file:
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype=dtype).data)
        file.flush()
        return np.memmap(file, dtype, "r+", shape=(length,))


def selected(array: np.ndarray, positions: np.ndarray, folder: Path | None) -> np.ndarray:
    """Return the entries at some positions, or those for which a boolean mask is true; see `stored`."""
    if positions.dtype == bool:
        parts: Iterable[np.ndarray] = (
            block[mask] for block, mask in zip(blocks(array), blocks(positions), strict=True)
        )
        return stored(parts, int(np.count_nonzero(positions)), array.dtype, folder)
    return stored((array[block] for block in blocks(positions)), len(positions), array.dtype, folder)


def lowest_distinct(keys: np.ndarray, share: float) -> int | None:
    """Return the quantile of the distinct values: the largest of the lowest `share` of them, which is at least one value.

    Args:
        keys: Integers, which are sorted in place.
        share: In [0, 1].

    Returns:
        The value; None if there are no keys.
    """
    if not len(keys):
        return None
    keys.sort()

    def distinct() -> Iterator[np.ndarray]:
        last = None
        for block in blocks(keys):
            yield np.unique(block[block != last] if last is not None else block)
            last = block[-1]

    remaining = max(1, round(sum(map(len, distinct())) * share))
    for values in distinct():
        if remaining <= len(values):
            return int(values[remaining - 1])
        remaining -= len(values)
    raise AssertionError("the share exceeds 1")
