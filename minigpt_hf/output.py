"""Make standard output and standard error robust against unencodable characters and closed readers.

Characters that the encoding of a stream lacks are written as escapes (`\\xe9`). For commands that must outlast their
terminal, write errors are reported once, and further output is dropped.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)


class GuardedStream:
    """A text stream that handles errors of the stream it wraps.

    Args:
        stream: The wrapped stream.
        lasting: Whether to continue without output if writing fails (`| head`, a closed terminal, a full disk).
    """

    def __init__(self, stream: TextIO, lasting: bool):
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
        """Replace the stream by the null device, or raise the error."""
        if not self._lasting:
            raise error
        broken, self._stream = self._stream, Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        discard(broken)
        logger.warning(
            f"{getattr(broken, 'name', 'the output')} cannot be written ({error.strerror}); training continues without it"
        )


def discard(stream: TextIO) -> None:
    """Redirect the descriptor of a stream to the null device, so that flushing it at exit does not fail."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream without a descriptor
        return
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, descriptor)
    os.close(null_device)


@contextmanager
def guarded_output(lasting: bool) -> Iterator[None]:
    """Wrap `sys.stdout` and `sys.stderr` within the block; closed streams are replaced by the null device."""
    before = sys.stdout, sys.stderr
    null_device = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = (GuardedStream(stream or null_device, lasting) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        null_device.close()


def open_standard_descriptors() -> None:
    """Open the null device for closed descriptors 0, 1 and 2; otherwise the next opened file would get their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
