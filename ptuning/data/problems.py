"""One fault in a data file, and how the values in it are named in a message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that keeps one row of a data file from being used. `str()` gives `file:line: field: problem: fix`."""

    file: str
    line: int  # counted from 1: where the row starts
    field: str  # the column, or "row" or "JSON" where the whole row is at fault
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.problem}: {self.fix}"


def quoted(text: str, limit: int = 40) -> str:
    """The text in quotes on one line, cut after `limit` characters. What a terminal can't show appears escaped."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}…"


def listed(names: list[str], limit: int = 20) -> str:
    """The names in quotes with commas between them, at most `limit` of them."""
    shown = ", ".join(quoted(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"


def described(value: object) -> str:
    """What a value read from JSON is, for a message: "the number 5", "a list of 3", "text 'abc'"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return f"text {quoted(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with the keys {listed(list(value))}" if value else "an empty object"
    return f"a {type(value).__name__}"
