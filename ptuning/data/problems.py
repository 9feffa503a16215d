"""What can be wrong with a data file, and how to correct it: the values of a row, the syntax of JSON, and their messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

JSON_FIELD = "JSON"

_PAIRS = 'write the history as [["question", "answer"], …], oldest first'
_LONGEST_INT = 4000  # digits; Python refuses to convert more than 4,300, with a ValueError that has no position


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that keeps one row of a data file from being used. `str()` gives `file:line: field: problem: fix`."""

    file: str
    line: int  # counted from 1: where the row starts; the row, where there are no lines
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


class Finding(NamedTuple):
    """What is wrong with a value and how to correct it; the caller knows the file, the line and the column."""

    problem: str
    fix: str


def text_finding(value: object) -> Finding | None:
    """None for text with at least one visible character and no lone surrogate, which UTF-8 can't encode."""
    if value is None:
        return Finding("is null", "write a text or delete the row")
    if not isinstance(value, str):
        fix = f'put it in double quotes: "{value}"' if _is_number(value) else "write one text"
        return Finding(f"is {described(value)}, not text", fix)
    if not value:
        return Finding("is empty", "write a text or delete the row")
    if not value.strip():
        return Finding(f"is only white space ({quoted(value)})", "write a text or delete the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(value[error.start]):04x}"
        problem = f"has half a character ({escape}, a lone surrogate) as character {error.start + 1}"
        return Finding(problem, "delete the escape, or write both halves of the pair")
    return None


def optional_text_finding(value: object) -> Finding | None:
    """None for text, and for what stands for no text: null and white space."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_finding(value)


def history_finding(value: object) -> Finding | None:
    """None for a list of [question, answer] pairs of text, and for what stands for no history: null and blank text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list):
        return Finding(f"is {described(value)}, not a list of [question, answer] pairs", _PAIRS)
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            return Finding(f"turn {number} is {described(turn)}, not a pair [question, answer]", _PAIRS)
        for name, text in zip(("question", "answer"), turn, strict=True):
            if found := text_finding(text):
                return Finding(f"the {name} of turn {number} {found.problem}", found.fix.replace("the row", "the turn"))
    return None


def history_pairs(value: object) -> tuple[tuple[str, str], ...]:
    """The (question, answer) turns of a value without a history_finding, oldest first."""
    return tuple((question, answer) for question, answer in value) if isinstance(value, list) else ()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and len(str(value)) <= 40


def decoder() -> json.JSONDecoder:
    """A decoder for rows. An integer too long for Python becomes a float, so that it is a fault of its row only."""
    return json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= _LONGEST_INT else float(digits))


def too_deep(file: str, line: int) -> Problem:
    """The problem of brackets within brackets that exceed Python's recursion limit."""
    fix = "a row is one flat object of text values: delete the nested value"
    return Problem(file, line, JSON_FIELD, "the brackets are nested too deeply to be read", fix)


def bad_json(file: str, error: json.JSONDecodeError, first_line: int = 1, columns_before: int = 0) -> Problem:
    """The problem of a syntax error: its line and column (both from 1), the text there and how to correct it.

    Args:
        file: its path, for the message.
        error: the decoder's, on a text that may be a part of the file.
        first_line: the number that line 1 of that text has in the file.
        columns_before: characters that stand before the text on that line.
    """
    text, (position, message) = error.doc, _in_every_python(error)
    line_start = text.rfind("\n", 0, position) + 1
    line_end = text.find("\n", position)
    line_end = len(text) if line_end < 0 else line_end
    near = text[max(line_start, position - 20) : min(line_end, position + 20)].strip()
    column = position - line_start + 1 + (columns_before if line_start == 0 else 0)
    place = f"near {quoted(near)}" if near else "on an empty line"
    return Problem(
        file,
        first_line + text.count("\n", 0, position),
        JSON_FIELD,
        f"{message.removesuffix(' at')} at column {column}, {place}",
        _fix(text, position, message),
    )


def _in_every_python(error: json.JSONDecodeError) -> tuple[int, str]:
    """Position and message as Python 3.13 has them: of a comma too many earlier ones speak only at the bracket behind it."""
    before = error.doc[: error.pos].rstrip(" \t\r\n")
    expected = {"]": ("array", "Expecting value"), "}": ("object", "Expecting property name")}
    kind, said = expected.get(error.doc[error.pos : error.pos + 1], ("", " "))
    if before.endswith(",") and error.msg.startswith(said):
        return len(before) - 1, f"Illegal trailing comma before end of {kind}"
    return error.pos, error.msg


def _fix(text: str, position: int, message: str) -> str:
    here = text[position : position + 1]
    before, after = text[:position].rstrip()[-1:], text[position + 1 :].lstrip()[:1]
    if (here in ("}", "]") and before == ",") or (here == "," and after in ("}", "]")):
        return "delete the comma before the closing bracket"
    if "Unterminated string" in message:
        return 'close the text with a double quote; a line break inside a text is written \\n, a double quote \\"'
    if not text[position:].strip():
        return (
            "close the open bracket, or complete a file that was cut off; "
            "rows spread over several lines must stand in one array: [row, row, …]"
        )
    if "control character" in message:
        return "write a line break inside a text as \\n and a tab as \\t"
    if here == "\\":
        return "write a backslash inside a text as \\\\"
    if here == "'":
        return "use double quotes instead of single ones"
    if here in "“”‘’，：｛｝［］【】":
        return f"replace the full-width {here} by its ASCII counterpart"
    if here == "\ufeff":
        return "delete the invisible byte order mark there, left from joining files"
    if position == 0 and here not in ("{", "["):
        return "start the row with {, or give a CSV file a name that ends in .csv"
    if "Extra data" in message:
        return "put one object on each line, or all rows into one array: [row, row, …]"
    return "correct the JSON there"
