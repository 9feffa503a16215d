"""Question-answer records from a data file, each checked, with messages that name file, line, column and fix."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from typing import cast

from ptuning.data.files import data_fingerprint, read_text
from ptuning.data.problems import Problem, listed
from ptuning.data.rows import Row, iterate_rows
from ptuning.data.values import history_fault, history_pairs, text_fault
from ptuning.errors import ConfigError, DataError

__all__ = ["Columns", "Problem", "Record", "data_fingerprint", "read_records"]

_SHOWN = 10  # problems printed in one message; the rest is counted


@dataclass(frozen=True, slots=True)
class Record:
    """One example to train on or to answer."""

    prompt: str
    response: str | None  # None only where the response column was not asked for: prediction without references
    history: tuple[tuple[str, str], ...]  # past (question, answer) turns, oldest first
    source: str  # "data/train.json:17", the line where the row starts


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a file's columns. A response or history of None is not read.

    Raises:
        ConfigError: a name is empty, or two are the same.
    """

    prompt: str
    response: str | None
    history: str | None = None

    def __post_init__(self) -> None:
        flag_of: dict[str, str] = {}
        for flag, name in self.flags():
            if not name:
                raise ConfigError(f"{flag} is {name!r}: give the name of a column")
            if name in flag_of:
                raise ConfigError(f"{flag_of[name]} and {flag} are both {name!r}: name two different columns")
            flag_of[name] = flag

    def flags(self) -> list[tuple[str, str]]:
        """The columns to read as (command-line flag, column name)."""
        pairs = (("prompt", self.prompt), ("response", self.response), ("history", self.history))
        return [(f"--{kind}_column", name) for kind, name in pairs if name is not None]


@dataclass(slots=True)
class _Survey:
    """What was found while reading."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    rows: int = 0
    objects: int = 0  # rows that have columns at all
    bad_rows: int = 0
    first_line: int = 1
    seen: dict[str, None] = field(default_factory=dict)  # every column, in order of appearance


def read_records(
    path: str | os.PathLike[str],
    columns: Columns,
    *,
    max_samples: int | None = None,
    skip_invalid: bool = False,
) -> tuple[list[Record], list[Problem]]:
    """Read a JSON array, JSON lines or CSV (.csv) file in UTF-8.

    Args:
        path: the file. The records' `source` and the messages spell it as it is given here.
        columns: the columns to read; others are ignored. A history that is null, blank or absent from a row is empty.
        max_samples: stop at this many valid rows, counted from the start of the file. Rows after them are not checked.
        skip_invalid: leave out rows with problems and return their problems, instead of raising.

    Returns:
        The valid rows in the file's order, at least one, and the problems of the rows left out.

    Raises:
        ConfigError: max_samples is below 1.
        DataError: the file can't be read as rows, a column is in no row, a row has a problem and skip_invalid is off,
            or no valid row is left.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max_samples is {max_samples}, the least is 1: give a larger number or leave it out for all")
    file = os.fspath(path)
    survey = _survey(file, columns, max_samples)
    absent = [(flag, name) for flag, name in columns.flags() if name not in survey.seen]
    if absent and survey.objects:
        raise DataError("\n".join(str(_absent_column(file, flag, name, survey)) for flag, name in absent))
    if not survey.rows:
        raise DataError(f"{file}: has 0 rows, at least 1 is needed: write rows into it")
    if not survey.records or (survey.problems and not skip_invalid):
        raise DataError(_refusal(file, survey))
    return survey.records, survey.problems


def _survey(file: str, columns: Columns, max_samples: int | None) -> _Survey:
    survey = _Survey()
    for line, row in iterate_rows(file, read_text(file), json_column=columns.history):
        if len(survey.records) == max_samples:
            # Enough. Only a history column that no row had yet is still looked for: the first rows of a file may well
            # be single turns, and that must not look like a misspelt column.
            if columns.history is None or columns.history in survey.seen:
                break
            if isinstance(row, dict):
                survey.seen.update(dict.fromkeys(row))
            continue
        if not survey.rows:
            survey.first_line = line
        survey.rows += 1
        if isinstance(row, dict):
            survey.objects += 1
            survey.seen.update(dict.fromkeys(row))
            problems = _row_problems(file, line, row, columns)
        else:
            problems = [row]
        if problems:
            survey.bad_rows += 1
            survey.problems += problems
        else:
            survey.records.append(_record(f"{file}:{line}", row, columns))
    return survey


def _row_problems(file: str, line: int, row: Row, columns: Columns) -> list[Problem]:
    problems = []
    for name in (columns.prompt, columns.response):
        if name is None:
            continue
        if name not in row:
            problem, fix = f"this row has no such column, it has {listed(list(row))}", "add it or delete the row"
            problems.append(Problem(file, line, name, problem, fix))
        elif fault := text_fault(row[name]):
            problems.append(Problem(file, line, name, *fault))
    if columns.history is not None and (fault := history_fault(row.get(columns.history))):
        problems.append(Problem(file, line, columns.history, *fault))
    return problems


def _record(source: str, row: Row, columns: Columns) -> Record:
    """A row without problems: its values are known to be text."""
    return Record(
        prompt=cast(str, row[columns.prompt]),
        response=None if columns.response is None else cast(str, row[columns.response]),
        history=() if columns.history is None else history_pairs(row.get(columns.history)),
        source=source,
    )


def _absent_column(file: str, flag: str, name: str, survey: _Survey) -> Problem:
    names = list(survey.seen)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    fix = f"set {flag} to the name it has in the file" + (f", maybe {near[0]!r}" if near else "")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        fix = "separate the cells with commas when exporting the CSV"
    problem = f"no row has this column, the columns are {listed(names)}"
    return Problem(file, survey.first_line, name, problem, fix)


def _refusal(file: str, survey: _Survey) -> str:
    total = len(survey.problems)
    count = "1 problem" if total == 1 else f"{total} problems"
    shown = [f"  {problem}" for problem in survey.problems[:_SHOWN]]
    if total > _SHOWN:
        shown.append(f"  and {total - _SHOWN} more")
    # Skipping is no way on where it would leave nothing.
    way_on = (
        "Correct them, or go on without these rows: --skip_invalid_rows true"
        if survey.records
        else "No valid row is left: correct the file"
    )
    return "\n".join([f"{file}: {count} in {survey.bad_rows} of {survey.rows} rows", *shown, way_on])
