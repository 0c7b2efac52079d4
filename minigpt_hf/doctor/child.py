"""Run a module of this package in a separate process with time and memory limits: it may hang, crash or run untrusted code.

The module yields rows, which are written to a file as soon as they are known. The process has no standard input, a minimal
environment (no token, offline mode of the Hub client) and an empty working directory. This package is imported as `doctor`,
not as `minigpt_hf.doctor`, so that `minigpt_hf` is imported, and its classes are registered, only where a check does so.
"""

import json
import os
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import get_args

from .row import Row, State, plain

# `-P` excludes the working directory from the path. The package is imported as top-level package `doctor`.
START = (
    "import sys; sys.path.append(sys.argv[1]); from doctor.child import work; from importlib import import_module; "
    "import_module('doctor.' + sys.argv[2]); sys.path.remove(sys.argv[1]); work(*sys.argv[2:])"
)
INHERITED = (  # environment variables
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
)
MAX_OUTPUT = 1 << 20  # bytes


def rows_of(module: str, folder: Path, names: Sequence[str], seconds: float, memory: int, *words: str) -> list[Row]:
    """Run `doctor.<module>.rows(folder, *words)` in a separate process. Returns one row for each of `names`.

    If the process ends early, the first missing row fails, and the remaining ones are not applicable.

    Args:
        seconds: Time limit, after which the process and its descendants are killed.
        memory: Limit of allocated bytes, on Linux.
    """
    with tempfile.TemporaryDirectory(prefix="minigpt-doctor-", ignore_cleanup_errors=True) as place:
        answer = Path(place) / "rows"
        command = [sys.executable, "-P", "-c", START, str(Path(__file__).parents[1]), module, str(answer), str(memory)]
        process = subprocess.Popen(
            [*command, str(folder.resolve()), *words],
            cwd=place,
            env=_environment(place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that its descendants can be killed, too
        )
        try:
            process.wait(seconds)
            end = f"the process ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            end = f"the process took more than {seconds:.0f} s"
        finally:
            _end(process)
        given = _read(answer)
    missing = [name for name in names if name not in given]
    found = {name: Row(name, "not applicable", f"not reached: {end}") for name in missing[1:]}
    if missing:
        found[missing[0]] = Row(missing[0], "fail", end, "load the folder manually to see the error")
    return [given.get(name) or found[name] for name in names]


def work(module: str, answer: str, memory: str, folder: str, *words: str) -> None:
    """In the separate process: write each row as soon as it is known."""
    if sys.platform == "linux":  # not supported on macOS and Windows
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    with Path(answer).open("w", encoding="utf-8") as file:
        for row in import_module(f"doctor.{module}").rows(Path(folder), *words):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


def _environment(place: str) -> dict[str, str]:
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    here = dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP", "HF_HOME", "XDG_CACHE_HOME"), place)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "PYTHONUSERBASE": site.getuserbase()}
    return {**environment, **here, **offline}


def _end(process: subprocess.Popen) -> None:
    if os.name != "nt":
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the process leads a session, so its group has the same id
        except ProcessLookupError:
            return
    process.kill()
    process.wait()


def _read(answer: Path) -> dict[str, Row]:
    """Read the rows. Code of the folder may have written to the file, so the content is validated."""
    if answer.is_symlink() or not answer.is_file():
        return {}
    with answer.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(MAX_OUTPUT).split("\n")[:-1]
    rows = {}
    for line in lines:
        try:
            row = Row(**json.loads(line))
            rows[row.name] = Row(row.name, row.state, plain(row.reason), plain(row.remedy))
        except (ValueError, TypeError):
            continue  # invalid: the row counts as missing
    return {name: row for name, row in rows.items() if row.state in get_args(State)}
