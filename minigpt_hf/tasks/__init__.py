"""Tasks: questions and answers to train chat models on, built on the user's machine by `minigpt data`.

A task is a folder that `minigpt train --data` reads:

    train.jsonl, validation.jsonl, test.jsonl    rows with `prompt` and `completion`
    README.md                                    source, license, split, counts

Training uses the first file, validation the second; the third is for `minigpt evaluate --score`. The package contains no text
of any source. The same seed and source give the same files.
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import MiniGPTError
from . import debian, generated, quiz
from .task import Task

# Functions (seed) -> task of the tasks without a source.
GENERATED: dict[str, Callable[[int], Task]] = {
    "arithmetic": generated.arithmetic,
    "spelling": generated.spelling,
    "sorting": generated.sorting,
    "dates": generated.dates,
    "numbers": generated.numbers,
}
# Functions (source, seed) -> task.
FROM_SOURCE: dict[str, Callable[[Path | None, int], Task]] = {"quiz": quiz.quiz, "synopsis": debian.synopsis}
TASKS = (*GENERATED, *FROM_SOURCE, "translation")


def build(name: str, seed: int = 0, source: Path | None = None, language: str | None = None) -> Task:
    """Build a task.

    Args:
        name: One of `TASKS`.
        seed: Determines the split, and the content of generated tasks.
        source: Folder with the files of the source. Default: where the system has them.
        language: Target language of `translation`. Default: `it`.

    Raises:
        MiniGPTError: if the source is missing or an argument does not apply to the task.
    """
    if language is not None and name != "translation":
        raise MiniGPTError(f"--language {language} does not apply to {name}: omit it")
    if name == "translation":
        return debian.translation(source, seed, language or "it")
    if name in FROM_SOURCE:
        return FROM_SOURCE[name](source, seed)
    if source is not None:
        raise MiniGPTError(f"--source {source}: {name} is generated and has no source; omit it")
    return GENERATED[name](seed)
