"""Where JSON is broken and what to do about it: the decoder's complaint in words for the one who wrote the file."""

from __future__ import annotations

import json

from ptuning.data.problems import Problem, quoted

JSON_FIELD = "JSON"


_LONGEST_INT = 4000  # digits; Python refuses to convert more than 4,300, with a ValueError that has no position


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
    text, position = error.doc, error.pos
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
        f"{error.msg.removesuffix(' at')} at column {column}, {place}",
        _fix(text, position, error.msg),
    )


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
