"""Rows of any source, by the name that it is given as. To read another kind of file, write its Source and name its ending here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ptuning.config.options import DATASET
from ptuning.data.arrow import arrow_rows, hub_files, hub_rows, parquet_rows, saved_files, saved_rows
from ptuning.data.files import GZIP, data_fingerprint, first_character, is_folder
from ptuning.data.json_rows import json_rows
from ptuning.data.problems import listed
from ptuning.data.source import Progress, Rows, Source
from ptuning.data.tables import csv_rows, tsv_rows, workbook_rows
from ptuning.errors import DataError

_TEXT = {".json": Source(json_rows), ".jsonl": Source(json_rows), ".csv": Source(csv_rows), ".tsv": Source(tsv_rows)}
_BINARY = {
    ".xlsx": Source(workbook_rows, unit="row"),
    ".parquet": Source(parquet_rows, unit="row"),
    ".arrow": Source(arrow_rows, unit="row"),
}
ENDINGS = _TEXT | {ending + GZIP: source for ending, source in _TEXT.items()} | _BINARY
_SAVED = Source(saved_rows, saved_files, "row")  # a folder
_HUB = Source(hub_rows, hub_files, "row")  # dataset:NAME:SPLIT
_URL = re.compile(r"[A-Za-z][\w+.-]*://")
_READ = f"read are {', '.join(_TEXT)} (also with {GZIP}), {', '.join(_BINARY)}"


def iterate_rows(
    path: str | os.PathLike[str],
    *,
    json_columns: Mapping[str, str] = MappingProxyType({}),
    progress: Progress = lambda bytes_read: None,
) -> Rows:
    """Yield each row as (line or row from 1, row), with a Problem in the place of a row that can't be read.

    The ending of the name decides how it is read; a file with any other ending may hold JSON. It is read as it goes.

    Args:
        path: a file, a folder that `save_to_disk` wrote, or dataset:NAME:SPLIT; messages spell it as it is given here.
        json_columns: columns whose cells hold JSON in a table, each with an example of it.
        progress: is told the bytes read so far.

    Raises:
        DataError: it can't be read, or has a fault after which the following rows can't be told apart: a syntax error in
            an array or in CSV.
    """
    name = os.fspath(path)
    return _source(name).read(name, json_columns, progress)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes that the rows come from, in 64 hex digits.

    Raises:
        DataError: they can't be read.
    """
    name = os.fspath(path)
    return data_fingerprint(*_source(name).files(name))


def size(path: str | os.PathLike[str]) -> int:
    """Those bytes' number, which is where `progress` ends."""
    name = os.fspath(path)
    return sum(file.stat().st_size for file in _source(name).files(name))


def unit(path: str | os.PathLike[str]) -> str:
    """What the numbers of its rows count: line or row."""
    return _source(os.fspath(path)).unit


def stem(path: str | os.PathLike[str]) -> str:
    """The last part of the name, without its ending."""
    name = Path(path).name.replace(":", "-")
    ending = max((ending for ending in ENDINGS if name.lower().endswith(ending)), key=len, default=None)
    return name[: -len(ending)] if ending else Path(name).stem


def _source(name: str) -> Source:
    if name.startswith(DATASET):
        return _HUB
    if _URL.match(name):
        raise DataError(f"{name}: a URL isn't read: download the file first and give its path ({_READ})")
    if not name.strip():
        raise DataError(f"{name!r}: the name of a data file is empty: give a file, or leave it out")
    if is_folder(name):
        return _saved(Path(name))
    return next((source for ending, source in ENDINGS.items() if name.lower().endswith(ending)), _OTHER)


def _saved(folder: Path) -> Source:
    if (folder / "state.json").is_file():
        return _SAVED
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # a folder that can be entered but not listed: then there are no names to propose
        entries = []
    splits = [entry.name for entry in entries if (entry / "state.json").is_file()]
    if splits:
        raise DataError(
            f"{folder}: this folder holds the splits {listed(splits)}: name one of them: {folder / splits[0]}"
        )
    files = [entry.name for entry in entries if entry.is_file() and entry.name.lower().endswith(tuple(ENDINGS))]
    hint = f"name one of its files: {listed(files)}" if files else f"it has none to name ({_READ})"
    raise DataError(f"{folder}: this is a directory, not a data file: {hint}")


def _other_rows(file: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    if first_character(file) not in "[{":
        raise DataError(f"{file}: the ending of the name says no format, and the text is no JSON: {_READ}")
    yield from json_rows(file, json_columns, progress)


_OTHER = Source(_other_rows)
