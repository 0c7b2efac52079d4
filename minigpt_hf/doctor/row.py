"""The result of a check, and the decorator that defines a check.

A check is a function that returns a `Row`; `@check` sets its name and handles exceptions. Text from a folder is shown with
control characters escaped, since they could control a terminal.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

State = Literal["pass", "fail", "not applicable"]
MAX_LENGTH = 400  # characters of a reason; names in a folder are of any length


@dataclass(frozen=True)
class Row:
    """The result of a check. `remedy` is empty unless it failed."""

    name: str
    state: State
    reason: str
    remedy: str = ""


class NotApplicable(Exception):
    """Raised in a check that does not apply to the folder; the message is the reason."""


def passed(reason: str) -> Row:
    return Row("", "pass", plain(reason))


def failed(reason: str, remedy: str) -> Row:
    return Row("", "fail", plain(reason), plain(remedy))


def not_applicable(reason: str) -> Row:
    return Row("", "not applicable", plain(reason))


@dataclass(frozen=True)
class Check:
    """A function that returns a `Row`. Exceptions become a failed row, so that the other checks still run.

    Args:
        row_name: Name of the row.
        function: The check.
        error_prefix: Start of the reason if the function raises an exception.
    """

    row_name: str
    function: Callable[..., Row]
    error_prefix: str

    def __call__(self, *args: Any) -> Row:
        try:
            row = self.function(*args)
        except NotApplicable as reason:
            row = not_applicable(str(reason))
        except Exception as error:  # a valid folder raises no exception
            row = failed(
                f"{self.error_prefix}: {in_one_line(error)}", "check that the files named here have the usual format"
            )
        return replace(row, name=self.row_name)


def check(name: str, error_prefix: str = "the check raised an error") -> Callable[[Callable[..., Row]], Check]:
    """Define a check; for the arguments see `Check`."""
    return lambda function: Check(name, function, error_prefix)


def in_one_line(error: BaseException) -> str:
    """An exception as `Type: first line of the message`."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def plain(text: str) -> str:
    """Escape text for printing in one line: the escape character becomes the four characters `\\x1b`."""
    shown = "".join(
        character.encode("unicode_escape").decode() if is_invisible(character) else character
        for character in text[: MAX_LENGTH + 1]
    )
    return shown if len(shown) <= MAX_LENGTH else shown[: MAX_LENGTH - 1] + "…"


def is_invisible(character: str) -> bool:
    """Whether a character is a control, format or unassigned character, or a line or paragraph separator."""
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def some(names: list[str], most: int = 3) -> str:
    """["a", "b", "c", "d"] -> "a, b, c and 1 more"."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
