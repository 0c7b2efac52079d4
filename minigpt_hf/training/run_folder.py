"""File layout of a run folder, and its log.

```text
RUN/
  recipe.yaml            settings as resolved
  fingerprint.json       what determines the numbers of the run; see `resume`
  log.jsonl              one JSON object per logged step, evaluation and sample
  samples.md             the samples, side by side
  checkpoint-N/          after N optimizer steps; see `checkpoint`
  bad-step-N.json        data of a step whose loss was not finite
  model/                 the model folder that is published
  .lock                  held while a process trains here; see `lock`
  .unfinished/           the checkpoint that is being written
  .pushing/              copies that are being uploaded
```
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_files
from ..errors import MiniGPTError

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class RunFolder:
    """The names of everything in a run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def fingerprint(self) -> Path:
        return self.path / FINGERPRINT

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.md"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def pushing(self) -> Path:
        return self.path / ".pushing"

    def bad_step(self, step: int) -> Path:
        return self.path / f"bad-step-{step}.json"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Checkpoints in ascending order of steps. Only names as written by `checkpoint` count, not `checkpoint-010`."""
        steps = {path: CHECKPOINT.fullmatch(path.name) for path in self.path.glob("checkpoint-*")}
        found = (path for path, step in steps.items() if step and path.is_dir())
        return sorted(found, key=lambda path: int(steps[path][1]))

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.fingerprint.is_file()


# -- the log ----------------------------------------------------------------------------------------------------------


def truncate_log(file: Path, step: int) -> None:
    """Remove the rows of steps after `step`, which are repeated, and those of this step that a resumed run writes again."""

    def stays(row: dict[str, Any]) -> bool:
        return row["step"] < step or (row["step"] == step and not row.keys() & {"sample", "train_runtime"})

    if not file.is_file():
        return
    rows, faults = rows_and_faults(file)
    if faults:
        lines = ", ".join(f"line {number}" for number in faults)
        logger.warning(f"{file}: removed what is not a complete row, as an interruption leaves it ({lines})")
    write_log(file, [row for row in rows if stays(row)])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of this package's making."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MiniGPTError(f"{file}: is not valid JSON ({error}); restore it, or say --fresh") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of `log.jsonl`; a line that is incomplete, as a kill or a full disk leaves it, is left out."""
    return rows_and_faults(file)[0]


def rows_and_faults(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of `log.jsonl`, and the numbers of its lines that are incomplete or hold values of a wrong type."""
    rows, faults = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row):
            rows.append(row)
        else:
            faults.append(number)
    return rows, faults


def is_row(row: Any) -> bool:
    """Whether a line of `log.jsonl` is what this package writes: numbers, and a sample that is text."""

    def is_number(value: Any) -> bool:
        return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)

    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and row["step"] >= 0
        and all(is_number(row[name]) for name in ("step", "seconds", "eval_loss") if name in row)
        and isinstance(row.get("sample", ""), str)
    )


def write_log(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `log.jsonl`."""
    write_files({file: "".join(json.dumps(row) + "\n" for row in rows)})


def append_to_log(file: Path, row: dict[str, Any]) -> None:
    """Add a row to `log.jsonl`: the whole line or, if that fails, nothing."""
    line = (json.dumps(row) + "\n").encode()
    with file.open("ab", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        try:
            written = opened.write(line)
            while written < len(line):  # a nearly full disk takes a part, and refuses the next
                written += opened.write(line[written:])
        except OSError:
            opened.truncate(size)
            raise
