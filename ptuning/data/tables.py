"""Rows of tables whose cells are text under a header: CSV, TSV and Excel workbooks."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import TextIO

from ptuning.data.files import bytes_read, first_character, opened_text, readable
from ptuning.data.problems import Problem, decoder, listed, quoted, too_deep
from ptuning.data.source import Progress, Row, Rows
from ptuning.errors import DataError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_QUOTED = re.compile(r'"[^"]*("|$)')


def csv_rows(file: str, json_columns: Mapping[str, str], progress: Progress, delimiter: str | None = None) -> Rows:
    """See Source. Blank lines are no rows.

    Args:
        delimiter: None: the comma, semicolon or tab that the header has most of.
    """
    first_character(file)  # which an empty file has not
    with opened_text(file, "") as stream:
        for line, row in _csv_rows(file, stream, json_columns, delimiter):
            progress(bytes_read(stream))
            yield line, row


tsv_rows = partial(csv_rows, delimiter="\t")


def _csv_rows(file: str, stream: TextIO, json_columns: Mapping[str, str], delimiter: str | None) -> Rows:
    # The stream keeps the line ends inside quoted cells; strict=True refuses unclosed quotes instead of guessing.
    before: list[str] = []
    for text in stream:
        before.append(text)
        if text.strip("\r\n"):
            break
    delimiter = delimiter or _delimiter(before[-1])
    reader = csv.reader(chain(before, stream), strict=True, delimiter=delimiter)
    start = 1

    def records() -> Iterator[tuple[int, list[str]]]:
        nonlocal start
        for cells in reader:
            line, start = start, reader.line_num + 1
            if cells:
                yield line, cells

    try:
        yield from _table_rows(file, "CSV", records(), json_columns, delimiter)
    except csv.Error as error:
        # The start of the record, because an unclosed quote is noticed only at the end of the file.
        problem = f"{error} in the record that starts on this line"
        limit = f"a cell holds at most {csv.field_size_limit():,} characters"
        fix = f'close each quoted cell, and write a quote inside it twice (""); {limit}'
        raise DataError(str(Problem(file, start, "CSV", problem, fix))) from None


def _delimiter(header: str) -> str:
    """The header alone decides: texts hold commas of their own, names hardly ever. The comma where nothing speaks for
    another."""
    return max(_DELIMITERS, key=_QUOTED.sub("", header).count)


def workbook_rows(file: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    """See Source. Lines are the sheet's own rows; cells are the texts that exporting the sheet as CSV would give."""
    return _table_rows(file, "sheet", _sheet_rows(file), json_columns, None)


def _sheet_rows(file: str) -> Iterator[tuple[int, list[str]]]:
    with readable(file):
        try:
            from openpyxl import load_workbook
        except ImportError:
            raise DataError(
                f"{file}: reading a workbook needs openpyxl: .venv/bin/python -m pip install openpyxl, or export the sheet as "
                "CSV in UTF-8"
            ) from None
        try:
            with closing(load_workbook(file, read_only=True, data_only=True)) as book:
                for sheet in book.worksheets:
                    sheet.reset_dimensions()  # some programs write wrong ones, and rows would be lost
                filled = [sheet for sheet in book.worksheets if next(_filled(sheet.values), None)]
                if len(filled) > 1:
                    names = listed([sheet.title for sheet in filled])
                    raise DataError(
                        f"{file}: has {len(filled)} sheets with cells ({names}): save the one to read alone"
                    )
                for sheet in filled:
                    yield from _filled(sheet.values)
        except (DataError, OSError):
            raise
        except Exception as error:  # a broken zip or XML comes as whatever the parts of openpyxl raise
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(
                f"{file}: can't be read as an .xlsx workbook ({said}): open and save it again, or export the sheet as CSV in UTF-8"
            ) from error


def _filled(rows: Iterable[Sequence[object]]) -> Iterator[tuple[int, list[str]]]:
    """The rows that have a cell with something in it, as texts, without the empty cells at their end."""
    for number, values in enumerate(rows, start=1):
        cells = [_text(value) for value in values]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            yield number, cells


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _table_rows(
    file: str,
    field: str,
    records: Iterable[tuple[int, list[str]]],
    json_columns: Mapping[str, str],
    delimiter: str | None,
) -> Rows:
    """The first record is the header.

    Args:
        field: names the table in problems of the header.
        delimiter: None where rows leave empty cells at their end out.
    """
    header: list[str] | None = None
    for line, cells in records:
        if header is None:
            header = _header(file, line, field, cells)
            continue
        if delimiter is None:
            cells = cells + [""] * (len(header) - len(cells))
        if len(cells) != len(header):
            yield line, _wrong_width(file, line, cells, header, delimiter)
        else:
            yield line, _row(file, line, dict(zip(header, cells, strict=True)), json_columns)


def _header(file: str, line: int, field: str, cells: list[str]) -> list[str]:
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        problem, fix = f"the header names {listed(twice)} more than once", "give each column its own name"
        raise DataError(str(Problem(file, line, field, problem, fix)))
    return cells


def _wrong_width(file: str, line: int, cells: list[str], header: list[str], delimiter: str | None) -> Problem:
    problem = f"has {len(cells)} cells, the header has {len(header)} ({listed(header)})"
    fix = "name its columns in the header, or clear the cells"
    if delimiter is not None:
        fix = f'put a cell with {_DELIMITERS[delimiter]} into double quotes: "a{delimiter} b"'
    return Problem(file, line, "row", problem, fix)


def _row(file: str, line: int, cells: dict[str, str], json_columns: Mapping[str, str]) -> Row | Problem:
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
