"""Standard output and standard error that no text and no reader can break.

In: the block in which they are guarded. Out: characters that their encoding does not have are written as escapes
(`\\xe9`); and where a run is to outlast its terminal, what cannot be written at all is dropped, with one warning.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class GuardedStream:
    """A text stream in front of another one.

    Args:
        stream: Where the text goes.
        lasting: Whether to continue without output when the other end is gone (`| head`, a closed terminal, a full disk).
    """

    def __init__(self, stream: io.TextIOBase, lasting: bool):
        self._stream, self._lasting = stream, lasting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Write to nowhere from now on."""
        if not self._lasting:
            raise error
        broken, self._stream = self._stream, Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        discard(broken)
        logger.warning(
            f"{getattr(broken, 'name', 'the output')} cannot be written ({error.strerror}); training continues without it"
        )


def discard(stream: io.TextIOBase) -> None:
    """Connect the descriptor of a stream to nowhere: what is left in its buffer must not fail when the interpreter ends."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream without a descriptor
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def guarded_output(lasting: bool) -> Iterator[None]:
    """Guard `sys.stdout` and `sys.stderr` within the block; where they are closed, they write to nowhere."""
    before = sys.stdout, sys.stderr
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = (GuardedStream(stream or nowhere, lasting) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        nowhere.close()


def open_standard_descriptors() -> None:
    """Connect closed descriptors 0, 1 and 2 to nowhere, lest the next file that is opened takes the number of one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
