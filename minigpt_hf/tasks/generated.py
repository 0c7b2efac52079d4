"""Tasks without a source, whose answers are computed."""

import random
from collections.abc import Iterable
from datetime import date, timedelta

from .task import Row, Task, row, split_by_group

RANDOM_ROWS = 10_000  # rows of a task whose questions are drawn at random
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def arithmetic(seed: int) -> Task:
    """Addition of two numbers from 0 to 99. `a + b` and `b + a` are in the same split."""
    pairs = ((a, b) for a in range(100) for b in range(100))
    rows = ((f"{min(pair)} {max(pair)}", row(f"{pair[0]} + {pair[1]}", str(sum(pair)))) for pair in pairs)
    return _task("arithmetic", "Addition of all pairs of numbers from 0 to 99.", "unordered pair", rows, seed)


def spelling(seed: int) -> Task:
    """Words of random syllables, spelled letter by letter."""
    generator = random.Random(seed)
    words = {
        "".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in range(generator.randint(1, 5)))
        for _ in range(RANDOM_ROWS)
    }
    rows = ((word, row(f"spell {word}", " ".join(word))) for word in sorted(words))
    return _task("spelling", "Invented words and their letters.", "word", rows, seed)


def sorting(seed: int) -> Task:
    """Lists of 3 to 8 digits in ascending order. All permutations of a list are in the same split."""
    generator = random.Random(seed)
    lists = (generator.choices("0123456789", k=generator.randint(3, 8)) for _ in range(RANDOM_ROWS))
    rows = ((" ".join(sorted(each)), row(f"sort {' '.join(each)}", " ".join(sorted(each)))) for each in lists)
    return _task("sorting", "Lists of 3 to 8 digits and the same digits in ascending order.", "multiset", rows, seed)


def dates(seed: int) -> Task:
    """The day after a date of the years 1980 to 2029."""
    first = date(1980, 1, 1)
    days = (first + timedelta(number) for number in range((date(2030, 1, 1) - first).days))
    rows = ((str(day), row(f"the day after {day}", str(day + timedelta(1)))) for day in days)
    return _task("dates", "Dates of the years 1980 to 2029 and the days after them.", "date", rows, seed)


def numbers(seed: int) -> Task:
    """English words for the numbers from 0 to 9,999."""
    rows = ((str(number), row(str(number), in_words(number))) for number in range(10_000))
    return _task("numbers", "The numbers from 0 to 9,999 and their English words.", "number", rows, seed)


def in_words(number: int) -> str:
    """Return a number in words: 2,345 -> two thousand three hundred forty-five."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {in_words(number % size)}" if number % size else ""
            return f"{in_words(number // size)} {name}{rest}"
    if number < len(SMALL):
        return SMALL[number]
    return TENS[number // 10] + (f"-{SMALL[number % 10]}" if number % 10 else "")


def _task(name: str, description: str, group: str, rows: Iterable[tuple[str, Row]], seed: int) -> Task:
    return Task(
        name=name,
        description=description,
        source="computed",
        license="CC0-1.0",
        split=f"by {group}: each is in one split",
        rows=split_by_group(rows, seed),
        seed=seed,
    )
