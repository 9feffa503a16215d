"""Rows of a data file with the lines they start on: a JSON array, JSON lines, or CSV with a header."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator

from ptuning.data.problems import Problem, described, listed, quoted
from ptuning.data.syntax import bad_json, decoder, too_deep
from ptuning.errors import DataError

Row = dict[str, object]

_SPACE = re.compile(r"[ \t\r\n]*")


def iterate_rows(file: str, text: str, *, json_column: str | None = None) -> Iterator[tuple[int, Row | Problem]]:
    """Yield each row of the file's text as (line from 1, row), with a Problem in the place of a row that can't be read.

    A name ending in .csv means CSV, where the cells of `json_column` hold JSON. Otherwise the content decides: a text
    that starts with "[" is a JSON array, any other is JSON lines. Blank lines are no rows.

    Raises:
        DataError: a fault after which the following rows can't be told apart: a syntax error in an array or in CSV.
    """
    if file.lower().endswith(".csv"):
        return _csv_rows(file, text, json_column)
    if text.lstrip().startswith("["):
        return _array_rows(file, text)
    return _json_lines(file, text)


def _array_rows(file: str, text: str) -> Iterator[tuple[int, Row | Problem]]:
    decode = decoder().raw_decode
    line, counted = 1, 0

    def skip_space(start: int) -> int:
        match = _SPACE.match(text, start)
        return match.end() if match else start

    position = skip_space(text.index("[") + 1)
    if text[position : position + 1] == "]":
        closing = position
    else:
        while True:
            line += text.count("\n", counted, position)
            counted = position
            try:
                value, end = decode(text, position)
            except json.JSONDecodeError as error:
                raise DataError(str(bad_json(file, error))) from None
            except RecursionError:
                raise DataError(str(too_deep(file, line))) from None
            yield line, _as_row(file, line, value)
            end = skip_space(end)
            if text[end : end + 1] == "]":
                closing = end
                break
            if text[end : end + 1] != ",":
                raise DataError(str(bad_json(file, json.JSONDecodeError("Expecting ',' delimiter", text, end))))
            position = skip_space(end + 1)
    rest = skip_space(closing + 1)
    if rest < len(text):
        raise DataError(str(bad_json(file, json.JSONDecodeError("Extra data after the array's ]", text, rest))))


def _json_lines(file: str, text: str) -> Iterator[tuple[int, Row | Problem]]:
    decode = decoder().decode
    # Not splitlines(): JSON allows U+2028 and U+0085 inside a text, and they are no line ends to an editor.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
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


def _csv_rows(file: str, text: str, json_column: str | None) -> Iterator[tuple[int, Row | Problem]]:
    # newline="" keeps the line ends inside quoted cells; strict=True refuses unclosed quotes instead of guessing.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(file, line, cells)
            elif len(cells) != len(header):
                yield line, _wrong_width(file, line, cells, header)
            else:
                yield line, _csv_row(file, line, dict(zip(header, cells, strict=True)), json_column)
    except csv.Error as error:
        # The start of the record, because an unclosed quote is noticed only at the end of the file.
        problem = f"{error} in the record that starts on this line"
        limit = f"a cell holds at most {csv.field_size_limit():,} characters"
        fix = f'close each quoted cell, and write a quote inside it twice (""); {limit}'
        raise DataError(str(Problem(file, start, "CSV", problem, fix))) from None


def _header(file: str, line: int, cells: list[str]) -> list[str]:
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        problem, fix = f"the header names {listed(twice)} more than once", "give each column its own name"
        raise DataError(str(Problem(file, line, "CSV", problem, fix)))
    return cells


def _wrong_width(file: str, line: int, cells: list[str], header: list[str]) -> Problem:
    problem = f"has {len(cells)} cells, the header has {len(header)} ({listed(header)})"
    return Problem(file, line, "row", problem, 'put a cell with commas into double quotes: "a, b"')


def _csv_row(file: str, line: int, cells: dict[str, str], json_column: str | None) -> Row | Problem:
    row: Row = dict(cells)
    if json_column in cells and (cell := cells[json_column]).strip():
        try:
            row[json_column] = decoder().decode(cell)
        except json.JSONDecodeError as error:
            problem = f"the cell is not JSON ({error.msg} at character {error.pos + 1} of {quoted(cell)})"
            fix = 'write it as [["question", "answer"]], each quote doubled as CSV wants it'
            return Problem(file, line, json_column, problem, fix)
        except RecursionError:
            return too_deep(file, line)
    return row
