"""The quiz: facts of quiz(6), a program of the BSD games, each asked in several wordings.

A data file has lines of columns separated by colons, e.g. capitals of Africa: `Algeria:Algiers`. A column is a pattern:

    a|b        alternatives
    {a}        optional
    b[c|d]e    delimiters
    \\          quotes the following character; at the end of a line, continues it

The first alternative, with everything optional, is the text: `{J{ohn} }Adams|Adams` -> John Adams.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MiniGPTError
from .task import Row, Task, fraction, row

DEFAULT_SOURCE = Path("/usr/share/games/bsdgames/quiz")
OVERSTRIKE = re.compile(r"(.)\x08(.)")
ACCENTS = {"^": "\u0302", "~": "\u0303", "'": "\u0301", "`": "\u0300", '"': "\u0308", ",": "\u0327"}
FRAMES = ("Name {}.", "Tell me {}.", "Do you know {}?", "I would like to know {}.")


@dataclass(frozen=True)
class Relation:
    """Questions of one kind.

    Args:
        columns: File, column of the question and column of the answer, separated by spaces.
        phrase: Completes `FRAMES`; `{}` is the subject.
        others: Further wordings.
    """

    columns: tuple[str, ...]
    phrase: str
    others: tuple[str, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        return (*(frame.format(self.phrase) for frame in FRAMES), *self.others)


RELATIONS = (
    Relation(
        ("africa 0 1", "america 0 1", "asia 0 1", "europe 0 1", "province 0 1", "state 0 1"),
        "the capital of {}",
        ("Which city is the capital of {}?", "What is the capital of {}?"),
    ),
    Relation(
        ("state 0 2",),
        "the postal abbreviation of {}",
        ("How is {} abbreviated in addresses?", "Which two letters stand for {}?"),
    ),
    Relation(
        ("state 0 3",),
        "the state flower of {}",
        ("Which flower stands for {}?", "What is the flower of the state of {}?"),
    ),
    Relation(
        ("elements 3 0",),
        "the chemical symbol of {}",
        ("Which symbol do chemists use for {}?", "How is {} written in formulas?"),
    ),
    Relation(
        ("elements 3 1",),
        "the atomic number of {}",
        ("How many protons does {} have?", "Where in the periodic table is {}?"),
    ),
    Relation(
        ("babies 1 0",),
        "the word for a young {}",
        ("What do you call a baby {}?", "What is the young of the {} called?"),
    ),
    Relation(
        ("collectives 0 1",),
        "the word for a group of {}",
        ("What do you call many {}?", "Many {} together form what?"),
    ),
    Relation(
        ("flowers 0 1",),
        "the meaning of the flower {}",
        ("What does the flower {} say?", "Someone sends {} as flowers. What is meant?"),
    ),
    Relation(("morse 0 1",), "the Morse code of {}", ("How is {} sent in Morse code?", "Send {} by telegraph.")),
    Relation(
        ("pres 0 1",),
        "the term of President {}",
        ("When was {} president?", "In which years did {} govern?"),
    ),
    Relation(
        ("pres 0 2",),
        "the vice president of {}",
        ("Who was vice president under {}?", "Who was the vice president when {} was president?"),
    ),
    Relation(
        ("pres 0 3", "inca 0 1", "sov 0 2"),
        "the successor of {}",
        ("Who came after {}?", "Who succeeded {}?"),
    ),
    Relation(("murders 0 1",), "the killer of {}", ("Who killed {}?", "Who is to blame for the end of {}?")),
    Relation(
        ("sexes 0 1",),
        "the female form of {}",
        ("A man is called {}. And a woman?", "Which word for a woman belongs to {}?"),
    ),
    Relation(("posneg 0 1",), "the opposite of {}", ("Which word means the contrary of {}?", "Not {}, but what?")),
    Relation(
        ("locomotive 0 1",),
        "the name of the wheel arrangement {}",
        ("What is a {} locomotive called?", "Which type of locomotive has {} wheels?"),
    ),
)


def quiz(source: Path | None, seed: int) -> Task:
    """Facts in several wordings, of which one is for testing and one for validation.

    Raises:
        MiniGPTError: if a file is missing or not UTF-8, or the files have no fact.
    """
    folder = source or DEFAULT_SOURCE
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    number = 0
    asked: dict[str, set[str]] = {}
    for relation in RELATIONS:
        for subject, answer in facts(folder, relation).items():
            number += 1
            order = sorted(relation.wordings, key=lambda wording: fraction(f"{seed} {wording} {subject}"))
            for place, wording in enumerate(order):
                split = ("test", "validation")[place] if place < 2 else "train"
                rows[split].append(row(wording.format(subject), answer))
                asked.setdefault(split, set()).add(wording)
    if not number:
        raise MiniGPTError(f"{folder}: its files contain no fact; give the folder of quiz(6) with --source")
    is_trained = asked["test"] | asked["validation"] <= asked["train"]
    trained = "each wording occurs in training with other facts"
    if not is_trained:
        trained = "some wordings do not occur in training, because there are few facts"
    return Task(
        name="quiz",
        description=f"{number:,} facts, each asked in {len(FRAMES) + 2} wordings.",
        source=f"data files of quiz(6), the BSD games, {folder}",
        license="BSD-3-Clause",
        split=f"by wording: of each fact, {len(FRAMES)} wordings are for training, one for validation and one for testing; "
        + trained,
        rows=rows,
        seed=seed,
        metric="exact",
    )


def facts(folder: Path, relation: Relation) -> dict[str, str]:
    """Return {subject: answer} of a relation, without subjects that have several answers."""
    result: dict[str, str] = {}
    ambiguous = set()
    for each in relation.columns:
        name, question, answer = each.split()
        for line in _lines(folder, name):
            columns = [text_of(column) for column in re.split(r"(?<!\\):", line)]
            if max(int(question), int(answer)) >= len(columns):
                continue
            subject, value = columns[int(question)], columns[int(answer)]
            if subject and value and result.setdefault(subject, value) != value:
                ambiguous.add(subject)
    return {subject: value for subject, value in result.items() if subject not in ambiguous}


def _lines(folder: Path, name: str) -> Iterator[str]:
    file = folder / name
    if not file.is_file():
        how = "install the package bsdgames (apt-get install bsdgames), or give the folder with --source"
        raise MiniGPTError(f"{file}: there is no such file; the quiz is made from the files of quiz(6): {how}")
    try:
        text = file.read_text(encoding="utf-8").replace("\\\n", "")
    except UnicodeDecodeError as error:
        raise MiniGPTError(
            f"{file}: byte {error.object[error.start]:#04x} at position {error.start:,} is not UTF-8; convert the file, e.g. "
            "with `iconv -f latin1 -t utf-8`"
        ) from error
    yield from filter(None, text.splitlines())


def text_of(pattern: str) -> str:
    """Return the longest form of a pattern's first alternative."""
    text, _ = _first_alternative(OVERSTRIKE.sub(_accented, pattern), 0)
    return " ".join(text.split())


def _accented(overstrike: re.Match) -> str:
    """Return a letter with the accent that a backspace puts on it: S~\\bao -> São."""
    return unicodedata.normalize("NFC", overstrike[2] + ACCENTS.get(overstrike[1], ""))


def _first_alternative(pattern: str, start: int) -> tuple[str, int]:
    """Return the text of a pattern up to the bracket that closes it, and the position of that bracket."""
    text, is_first, position = "", True, start
    while position < len(pattern) and pattern[position] not in "}]":
        added = pattern[position]
        if added == "|":
            is_first, added = False, ""
        elif added in "{[":
            added, position = _first_alternative(pattern, position + 1)
        elif added == "\\":
            position += 1
            added = pattern[position : position + 1]
        text += added if is_first else ""
        position += 1
    return text, position
