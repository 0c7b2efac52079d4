"""A command run as a process of its own, and what it took.

In: a command. Out: its output, wall-clock and processor seconds, and the most memory that it or one of its processes held.
It refuses a command that fails, and shows the end of what it said.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """`seconds` by the clock, `cpu_seconds` of this process and those it waited for, `megabytes` of the largest one."""

    output: str
    seconds: float
    cpu_seconds: float
    megabytes: float


def timed(argv: Sequence[str | Path], cwd: Path | None = None, **environment: str) -> Done:
    """Run a command to its end.

    Processor seconds leave out the time in which other programs had the core: on a busy machine they tell what a quiet
    one would need, the clock does not.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in argv],
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        _, status, usage = os.wait4(process.pid, 0)  # the one call that tells what this very process used
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} failed with exit code {process.returncode}:\n{text[-2000:]}")
    return Done(text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
