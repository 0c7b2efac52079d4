"""A task: questions and answers in three splits, and the files that hold them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import MiniGPTError

SPLITS = ("train", "validation", "test")
# Shares of the held-out splits, and limits for large tasks, because answers are generated one token at a time.
MAX_SHARES = {"validation": 0.05, "test": 0.1}
MAX_ROWS = {"validation": 500, "test": 1000}

Row = dict[str, str]  # {"prompt": text, "completion": text}


@dataclass(frozen=True)
class Task:
    """Questions and answers.

    Args:
        name: Name of the task.
        description: What is asked and answered.
        source: Origin of the text.
        license: License of the text.
        split: How the rows were divided.
        rows: Rows by split.
        seed: Seed with which the task was built.
        metric: Metric for `minigpt evaluate --score`.
    """

    name: str
    description: str
    source: str
    license: str
    split: str
    rows: dict[str, list[Row]]
    seed: int
    metric: str = "exact"

    def write(self, folder: Path) -> None:
        """Write the files of the task into an empty folder."""
        for split in SPLITS:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows[split])
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = "".join(f"| `{split}.jsonl` | {len(self.rows[split]):,} |\n" for split in SPLITS)
        (folder / "README.md").write_text(
            f"# {self.name}\n\n{self.description} Built by `minigpt data {self.name}` with seed {self.seed}.\n\n"
            f"- Source: {self.source}\n- License: {self.license}\n- Split: {self.split}\n\n"
            f"| file | rows |\n|---|---|\n{counts}",
            encoding="utf-8",
        )


def row(prompt: str, completion: str) -> Row:
    """Return a row of a task."""
    return {"prompt": prompt, "completion": completion}


def split_by_group(rows: Iterable[tuple[str, Row]], seed: int) -> dict[str, list[Row]]:
    """Divide rows into splits by the hash of their group, so that the rows of a group are in one split.

    About 10 % are for testing, at most 1,000 rows, and 5 % for validation, at most 500. Of several rows with the same prompt,
    the first is used.

    Args:
        rows: Pairs of group and row.

    Raises:
        MiniGPTError: if a split would be empty.
    """
    unique: dict[str, tuple[str, Row]] = {}
    for group, each in rows:
        unique.setdefault(each["prompt"], (group, each))
    shares = {name: min(share, MAX_ROWS[name] / max(len(unique), 1)) for name, share in MAX_SHARES.items()}
    result: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for group, each in unique.values():
        value = fraction(f"{seed} {group}")
        held_out = "test" if value < shares["test"] else "validation"
        result[held_out if value < sum(shares.values()) else "train"].append(each)
    if empty := [split for split in SPLITS if not result[split]]:
        raise MiniGPTError(f"{len(unique):,} rows are too few for three splits ({empty[0]} would be empty): give more")
    return result


def fraction(text: str) -> float:
    """Map a text to a pseudo-random number in [0, 1) by its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
