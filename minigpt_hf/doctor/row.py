"""One line of the doctor's table, and what every check shares.

A check is a small function of a `Folder` that returns a `Row`; `@check` gives it its name. What a folder says is never
printed as it stands: control characters, which could rewrite a terminal, are shown as escapes.
"""

import functools
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

State = Literal["pass", "fail", "not applicable"]
LONGEST = 400  # characters of a reason: names in a folder may be as long as they like


@dataclass(frozen=True)
class Row:
    """What one check found. `remedy` is empty unless it failed."""

    name: str
    state: State
    reason: str
    remedy: str = ""


class NotApplicable(Exception):
    """Raised inside a check that has nothing to look at; the message becomes the reason."""


def passed(reason: str) -> Row:
    return Row("", "pass", plain(reason))


def failed(reason: str, remedy: str) -> Row:
    return Row("", "fail", plain(reason), plain(remedy))


def not_applicable(reason: str) -> Row:
    return Row("", "not applicable", plain(reason))


def check(name: str, stumbled: str = "the check stumbled") -> Callable[[Callable[..., Row]], Callable[..., Row]]:
    """Name a check, and turn what it raises into its row: no folder, however odd, stops the doctor."""

    def named(function: Callable[..., Row]) -> Callable[..., Row]:
        @functools.wraps(function)
        def run(*args: Any) -> Row:
            try:
                row = function(*args)
            except NotApplicable as reason:
                row = not_applicable(str(reason))
            except Exception as error:  # a folder that makes a check stumble is not in order
                row = failed(
                    f"{stumbled}: {in_one_line(error)}",
                    "see that the files this row speaks of are of the usual form",
                )
            return replace(row, name=name)

        run.row_name = name
        return run

    return named


def in_one_line(error: BaseException) -> str:
    """An exception as `Type: first line of the message`."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def plain(text: str) -> str:
    """Text that is safe to print, on one line: an escape character becomes the four characters `\\x1b`."""
    shown = "".join(
        character.encode("unicode_escape").decode() if is_invisible(character) else character
        for character in text[: LONGEST + 1]
    )
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def is_invisible(character: str) -> bool:
    """Whether a character is a control, a format (such as those that turn the direction of text), or no character."""
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def some(names: list[str], most: int = 3) -> str:
    """["a", "b", "c", "d"] -> "a, b, c and 1 more"."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
