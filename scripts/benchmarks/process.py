"""Run a command in a subprocess and measure its wall time, CPU time and peak memory."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CompletedProcess:
    """Output and resource usage of a finished process.

    Args:
        output: Standard output and standard error.
        seconds: Wall time.
        cpu_seconds: User and system time of the process and of those it waited for.
        megabytes: Peak resident memory of the largest of these processes, in MiB.
    """

    output: str
    seconds: float
    cpu_seconds: float
    megabytes: float


def timed(argv: Sequence[str | Path], cwd: Path | None = None, **environment: str) -> CompletedProcess:
    """Run a command and wait for it.

    CPU time excludes the time in which other processes had the core, so it is comparable on a loaded machine.

    Args:
        environment: Additional environment variables.

    Raises:
        RuntimeError: if the exit code is not 0; the message ends with the last 2,000 characters of the output.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(argument) for argument in argv],
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        _, status, usage = os.wait4(process.pid, 0)  # unlike `getrusage`, reports the usage of this one process
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} failed with exit code {process.returncode}:\n{text[-2000:]}")
    return CompletedProcess(text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
