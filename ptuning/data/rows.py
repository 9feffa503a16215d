"""Rows of a data file with the lines they start on: a JSON array, JSON lines, or CSV with a header."""

from __future__ import annotations

import csv
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TextIO

from ptuning.data.files import first_character, opened_text
from ptuning.data.json_array import array_values
from ptuning.data.problems import Problem, bad_json, decoder, described, listed, quoted, too_deep
from ptuning.errors import DataError

Row = dict[str, object]


def iterate_rows(
    path: str | os.PathLike[str],
    *,
    json_columns: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[int], object] = lambda bytes_read: None,
) -> Iterator[tuple[int, Row | Problem]]:
    """Yield each row of the file as (line from 1, row), with a Problem in the place of a row that can't be read.

    A name ending in .csv means CSV. Otherwise the content decides: a text that starts with "[" is a JSON array, any other
    is JSON lines. Blank lines are no rows. The file is read as it goes, in the memory of its longest row.

    Args:
        path: the file; messages spell it as it is given here.
        json_columns: columns whose cells hold JSON in a CSV file, each with an example of it.
        progress: is told the bytes read so far, row by row.

    Raises:
        DataError: the file can't be read as text, or has a fault after which the following rows can't be told apart: a
            syntax error in an array or in CSV.
    """
    file = os.fspath(path)
    first = first_character(path)
    read: Callable[[str, TextIO], Iterator[tuple[int, Row | Problem]]]
    if file.lower().endswith(".csv"):
        read, newline = functools.partial(_csv_rows, json_columns=json_columns), ""
    else:
        read, newline = (_array_rows, "") if first == "[" else (_json_lines, "\n")
    with opened_text(path, newline) as stream:
        for line, row in read(file, stream):
            progress(stream.buffer.tell())
            yield line, row


def _array_rows(file: str, stream: TextIO) -> Iterator[tuple[int, Row | Problem]]:
    for line, value in array_values(file, stream):
        yield line, _as_row(file, line, value)


def _json_lines(file: str, stream: TextIO) -> Iterator[tuple[int, Row | Problem]]:
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


def _csv_rows(file: str, stream: TextIO, json_columns: Mapping[str, str]) -> Iterator[tuple[int, Row | Problem]]:
    # The stream keeps the line ends inside quoted cells; strict=True refuses unclosed quotes instead of guessing.
    reader = csv.reader(stream, strict=True)
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
                yield line, _csv_row(file, line, dict(zip(header, cells, strict=True)), json_columns)
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


def _csv_row(file: str, line: int, cells: dict[str, str], json_columns: Mapping[str, str]) -> Row | Problem:
    row: Row = dict(cells)
    for name, example in json_columns.items():
        if name not in cells or not (cell := cells[name]).strip():
            continue
        try:
            row[name] = decoder().decode(cell)
        except json.JSONDecodeError as error:
            problem = f"the cell is not JSON ({error.msg} at character {error.pos + 1} of {quoted(cell)})"
            return Problem(file, line, name, problem, f"write it as {example}, each quote doubled as CSV wants it")
        except RecursionError:
            return too_deep(file, line)
    return row
