"""File layout of a run folder, and its log.

```text
RUN/
  recipe.yaml            resolved settings
  fingerprint.json       everything that determines the results of the run; see `resume`
  log.jsonl              one JSON object per logged step, evaluation and sample
  samples.md             the generated samples
  checkpoint-N/          after N optimizer steps; see `checkpoint`
  bad-step-N.json        data of a step with a non-finite or exploded loss
  model/                 the published model folder
  .lock                  locked during training; see `lock`
  .unfinished/           a checkpoint while it is written
  .pushing/              copies of checkpoints while they are uploaded
```
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_files
from ..errors import MiniGPTError
from ..trust import read_metadata

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
DESCRIPTIONS = "described"  # entry of a fingerprint: names and sizes for messages, which are not compared
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder."""

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
        """Checkpoints in ascending order of steps. Names not written by `checkpoint`, e.g. `checkpoint-010`, are ignored."""
        steps = {
            path: int(match[1])
            for path in self.path.glob("checkpoint-*")
            if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
        }
        return sorted(steps, key=lambda path: steps[path])

    def exists(self) -> bool:
        """Whether the folder contains a run."""
        return self.fingerprint.is_file()


def identity_of(fingerprint: dict[str, Any]) -> str:
    """SHA-256 of a fingerprint: equal for two runs if everything that determines their results is equal, also the seed."""
    compared = {name: value for name, value in fingerprint.items() if name != DESCRIPTIONS}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def is_model_of(model: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether a model was published by the run with this fingerprint."""
    metadata = read_metadata(model)
    if "run" in metadata:
        return metadata["run"] == identity_of(fingerprint)
    try:  # published by an earlier version, which recorded text, tokenizer and number of steps only
        validation, steps = metadata["data"]["validation"], fingerprint["max_steps"]
        published = {
            "data": metadata["data"]["train"]["fingerprint"],
            "validation": validation and validation["fingerprint"],
            "tokenizer": metadata["tokenizer"]["fingerprint"],
            "max_steps": metadata["training"]["planned_steps"] if steps > 0 else steps,
        }
    except (KeyError, TypeError):
        return False
    return all(published[name] == fingerprint[name] for name in published)


# -- the log ----------------------------------------------------------------------------------------------------------


def truncate_log(
    file: Path, step: int, scores: Collection[tuple[int, str]] = (), is_other_validation: bool = False
) -> None:
    """Remove the rows that a run resumed from `step` writes again: later ones, and samples and final times of `step`.

    Scores of another validation text are renamed, e.g. `earlier_eval_loss`, so that figures do not compare them.

    Args:
        scores: Step and `repr` of `eval_loss` of each evaluation in the checkpoint.
        is_other_validation: The validation text is another one from here on.
    """

    def is_score(row: dict[str, Any], name: str) -> bool:
        return (row["step"], repr(row.get(name))) in scores

    def is_kept(row: dict[str, Any]) -> bool:
        is_later = "eval_loss" in row and not is_score(row, "eval_loss")  # evaluated after the checkpoint was saved
        is_final = "train_runtime" in row and "loss" not in row  # rows of losses may have it, with the tokens seen
        is_again = is_later or is_final or "sample" in row
        return row["step"] < step or (row["step"] == step and not is_again)

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        if is_score(row, "earlier_eval_loss"):  # renamed when another validation text was tried
            row = {name.removeprefix("earlier_"): row[name] for name in row}
        if is_score(row, "eval_loss") and not is_other_validation:
            return row
        return {f"earlier_{name}" if name.startswith("eval_") else name: row[name] for name in row}

    rows, invalid = parse_log(file) if file.is_file() else ([], [])
    if step > 0 and not any(is_kept(row) for row in rows):
        logger.warning(
            f"{file}: has no rows up to step {step}; the times, the energy and the figures of the model card will be "
            "those of the steps from there on"
        )
    if not file.is_file():
        return
    if invalid:
        lines = ", ".join(f"line {number}" for number in invalid)
        logger.warning(f"{file}: removed incomplete or invalid rows, e.g. of an interrupted write ({lines})")
    write_log(file, [renamed(row) for row in rows if is_kept(row)])


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        MiniGPTError: if it is not valid JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MiniGPTError(f"{file}: not valid JSON ({error}); restore it, or use --fresh") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the rows of `log.jsonl` without invalid lines, e.g. of an interrupted write."""
    return parse_log(file)[0]


def parse_log(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of `log.jsonl`, and the numbers of lines that are incomplete or have values of a wrong type."""
    rows, invalid = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row):
            rows.append(row)
        else:
            invalid.append(number)
    return rows, invalid


def is_row(row: Any) -> bool:
    """Whether a line of `log.jsonl` has the types that this package writes."""

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
    """Replace `log.jsonl` atomically."""
    write_files({file: "".join(json.dumps(row) + "\n" for row in rows)})


def append_to_log(file: Path, row: dict[str, Any]) -> None:
    """Append a row to `log.jsonl`. If writing fails, the file is unchanged."""
    line = (json.dumps(row) + "\n").encode()
    with file.open("ab", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        try:
            written = opened.write(line)
            while written < len(line):  # on a nearly full disk, a write may be partial before the next one fails
                written += opened.write(line[written:])
        except OSError:
            opened.truncate(size)
            raise
