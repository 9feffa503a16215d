"""Excel workbooks: a sheet is read as its export to CSV would be."""

import builtins
import datetime
from pathlib import Path

import pytest

from ptuning.data.formats import Columns
from ptuning.data.guess import FormatOptions
from ptuning.data.records import read_records
from ptuning.errors import DataError

COLUMNS = Columns("prompt", "response")


def workbook(path: Path, *sheets: list[list]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, COLUMNS)
    return str(caught.value)


def test_cells_are_texts(tmp_path):
    day = datetime.date(2024, 5, 1)
    rows = [
        [],
        ["prompt", "n", "response", None],
        ["多少", 1, 42],
        [],
        ["哪天", None, day, None],
        ["几个", 2, 3.0],
        ["x", 2, 1.5],
    ]
    path = workbook(tmp_path / "a.xlsx", rows, [], [])
    records, _ = read_records(path, COLUMNS)
    assert [(r.prompt, r.response) for r in records] == [
        ("多少", "42"),
        ("哪天", "2024-05-01 00:00:00"),
        ("几个", "3"),
        ("x", "1.5"),
    ]
    assert [r.source for r in records] == [f"{path}:{row}" for row in (3, 5, 6, 7)], "as the sheet numbers them"


def test_histories_are_json_in_a_cell(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [["prompt", "response", "history"], ["a", "b", '[["c", "d"]]'], ["e", "f"]])
    records, _ = read_records(path, FormatOptions())
    assert [r.history for r in records] == [(("c", "d"),), ()]


def test_faults_name_the_row(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [["prompt", "response"], ["a", "b"], ["a"], ["a", "b", None, "c"]])
    assert refusal(path).splitlines() == [
        f"{path}: 2 problems in 2 of 3 rows",
        f"  {path}:3: response: is empty: write a text or delete the row",
        f"  {path}:4: row: has 4 cells, the header has 2 ('prompt', 'response'): name its columns in the header, or clear the "
        "cells",
        "Correct them, or go on without these rows: --skip_invalid_rows true",
    ]
    path = workbook(tmp_path / "b.xlsx", [["prompt", "prompt"], ["a", "b"]])
    assert refusal(path) == (
        f"{path}:1: sheet: the header names 'prompt' more than once: give each column its own name"
    )


def test_several_sheets_are_not_chosen_from(tmp_path):
    sheet = [["prompt", "response"], ["a", "b"]]
    path = workbook(tmp_path / "a.xlsx", sheet, sheet)
    assert refusal(path) == f"{path}: has 2 sheets with cells ('Sheet', 'Sheet1'): save the one to read alone"


def test_no_rows_at_all(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [])
    assert refusal(path) == f"{path}: has 0 rows, at least 1 is needed: write rows into it"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"prompt,response\na,b\n"])
def test_what_is_no_workbook(tmp_path, content):
    pytest.importorskip("openpyxl")
    path = tmp_path / "a.xlsx"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: can't be read as an .xlsx workbook (BadZipFile: ")


def test_a_missing_workbook(tmp_path):
    pytest.importorskip("openpyxl")
    assert "no such file in" in refusal(tmp_path / "a.xlsx")


def test_a_missing_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "openpyxl":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"")
    assert refusal(path) == (
        f"{path}: reading a workbook needs openpyxl: .venv/bin/python -m pip install openpyxl, or export the sheet as CSV in "
        "UTF-8"
    )
