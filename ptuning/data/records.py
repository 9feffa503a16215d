"""Question-answer records from a data file, each checked, with messages that name file, line, column and fix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ptuning.data.formats import Columns, Record, Shape
from ptuning.data.guess import FormatOptions, Found, find_format
from ptuning.data.problems import Problem
from ptuning.data.rows import iterate_rows
from ptuning.data.source import Row
from ptuning.errors import ConfigError, DataError

_SHOWN = 10  # problems printed in one message; the rest is counted


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file: its record, or its problems.

    Args:
        row: as it stands in the file; None where it could not be read as an object.
    """

    line: int
    row: Row | None
    record: Record | None
    problems: tuple[Problem, ...] = ()


@dataclass
class Skipped:
    """The rows that were left out."""

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)


def iterate_records(
    path: str | os.PathLike[str], shape: Shape, progress: Callable[[int], object] = lambda bytes_read: None
) -> Iterator[Example]:
    """Reads a file row by row, in the memory of its longest row.

    Args:
        path: the file. The records' `source` and the messages spell it as it is given here.
        shape: of its rows, see find_format.
        progress: is told the bytes read so far, row by row.

    Raises:
        DataError: the file can't be read as rows, or not from here on.
    """
    file = os.fspath(path)
    for line, row in iterate_rows(file, json_columns=shape.json_columns, progress=progress):
        if isinstance(row, Problem):
            yield Example(line, None, None, (row,))
            continue
        found = shape.read(row, f"{file}:{line}")
        if isinstance(found, Record):
            yield Example(line, row, found)
        else:
            yield Example(line, row, None, tuple(Problem(file, line, name, *finding) for name, finding in found))


def valid_records(
    path: str | os.PathLike[str],
    shape: Shape,
    skipped: Skipped,
    *,
    max_samples: int | None = None,
    skip_invalid: bool = False,
    progress: Callable[[int], object] = lambda bytes_read: None,
) -> Iterator[Record]:
    """The valid rows in the file's order, at least one, in the memory of the longest. Arguments as in `read_records` and
    `iterate_records`.

    Args:
        skipped: receives the rows left out.

    Raises:
        ConfigError: as in `read_records`.
        DataError: as in `read_records`; problems of rows when all have been read.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max_samples is {max_samples}, the least is 1: give a larger number or leave it out for all")
    file, rows, valid = os.fspath(path), 0, 0
    for example in iterate_records(file, shape, progress):
        rows += 1
        if example.record is None:
            skipped.rows += 1
            skipped.problems += example.problems
        else:
            valid += 1
            yield example.record
            if valid == max_samples:
                break
    if not rows:
        raise DataError(f"{file}: has 0 rows, at least 1 is needed: write rows into it")
    if not valid or (skipped.rows and not skip_invalid):
        raise DataError(_refusal(file, skipped, rows, any_left=valid > 0))


def read_records(
    path: str | os.PathLike[str],
    columns: Columns | FormatOptions | Found,
    *,
    max_samples: int | None = None,
    skip_invalid: bool = False,
) -> tuple[list[Record], list[Problem]]:
    """Read a JSON array, JSON lines or CSV (.csv) file in UTF-8.

    Args:
        path: the file. The records' `source` and the messages spell it as it is given here.
        columns: the columns to read, others are ignored (a history that is null, blank or absent from a row is empty); or
            options, whose open questions are answered by a look at the first rows; or what find_format found.
        max_samples: stop at this many valid rows, counted from the start of the file. Rows after them are not checked.
        skip_invalid: leave out rows with problems and return their problems, instead of raising.

    Returns:
        The valid rows in the file's order, at least one, and the problems of the rows left out.

    Raises:
        ConfigError: max_samples is below 1.
        DataError: the file can't be read as rows, a column is in no row, a row has a problem and skip_invalid is off,
            or no valid row is left.
    """
    found = columns if isinstance(columns, Found) else find_format(path, columns)
    skipped = Skipped()
    records = list(valid_records(path, found.shape, skipped, max_samples=max_samples, skip_invalid=skip_invalid))
    return records, skipped.problems


def _refusal(file: str, skipped: Skipped, rows: int, any_left: bool) -> str:
    total = len(skipped.problems)
    count = "1 problem" if total == 1 else f"{total} problems"
    shown = [f"  {problem}" for problem in skipped.problems[:_SHOWN]]
    if total > _SHOWN:
        shown.append(f"  and {total - _SHOWN} more")
    # Skipping is no way on where it would leave nothing.
    way_on = (
        "Correct them, or go on without these rows: --skip_invalid_rows true"
        if any_left
        else "No valid row is left: correct the file"
    )
    return "\n".join([f"{file}: {count} in {skipped.rows} of {rows} rows", *shown, way_on])
