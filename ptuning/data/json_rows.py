"""Rows of JSON text: an array of objects, or one object on each line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TextIO

from ptuning.data.files import bytes_read, first_character, opened_text
from ptuning.data.json_array import array_values
from ptuning.data.problems import Problem, bad_json, decoder, described, too_deep
from ptuning.data.source import Progress, Row, Rows


def json_rows(file: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    """See Source. A text that starts with "[" is an array, any other is JSON lines, whose blank lines are no rows."""
    read, newline = (_array_rows, "") if first_character(file) == "[" else (_json_lines, "\n")
    with opened_text(file, newline) as stream:
        for line, row in read(file, stream):
            progress(bytes_read(stream))
            yield line, row


def _array_rows(file: str, stream: TextIO) -> Rows:
    for line, value in array_values(file, stream):
        yield line, _as_row(file, line, value)


def _json_lines(file: str, stream: TextIO) -> Rows:
    decode = decoder().decode
    # Line feeds alone end a line: JSON allows U+2028 and U+0085 inside a text, and they are no line ends to an editor.
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        content = content.removesuffix("\n")
        try:
            yield line, _as_row(file, line, decode(content))
        except json.JSONDecodeError as error:
            yield line, bad_json(file, error, first_line=line)
        except RecursionError:
            yield line, too_deep(file, line)


def _as_row(file: str, line: int, value: object) -> Row | Problem:
    if isinstance(value, dict):
        return value
    fix = 'write the row as {"column": "text", …}'
    return Problem(file, line, "row", f"is {described(value)}, not an object", fix)
