"""Rows of each format become records, and a bad row is named by file, line, column and fix."""

import json
from pathlib import Path

import pytest

from ptuning.data.formats import Columns, Record
from ptuning.data.problems import Problem
from ptuning.data.records import read_records
from ptuning.errors import ConfigError, DataError

COLUMNS = Columns("prompt", "response")
GOOD = {"prompt": "问", "response": "答"}


def write_lines(folder: Path, *rows: object) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def refusal(path: Path, columns: Columns = COLUMNS, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, columns, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.json", '[{"prompt": "问", "response": "答"},\n\n{"prompt":\n"b",\n"response": "c"}\n]\n', [1, 3]),
        ("a.jsonl", '\n [\n\n{"prompt": "问", "response": "答"}, {"prompt": "b", "response": "c"}]', [4, 4]),
        ("a.json", '{"prompt": "问", "response": "答"}\r\n\r\n{"prompt": "b", "response": "c"}\r\n', [1, 3]),
        ("a.JSONL", '\ufeff{"prompt": "问", "response": "答"}\n{"response": "c", "x": [1], "prompt": "b"}', [1, 2]),
        ("a.csv", "\ufeffprompt,response\n问,答\n\nb,c\n", [2, 4]),
        ("a.CSV", "x,response,prompt\r\n1,答,问\r\n2,c,b", [2, 3]),
    ],
)
def test_each_format_gives_the_same_records_with_true_line_numbers(tmp_path, name, text, lines):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    records, problems = read_records(path, COLUMNS)
    first, second = (f"{path}:{line}" for line in lines)
    assert records == [Record("问", "答", (), first), Record("b", "c", (), second)]
    assert problems == []


def test_line_breaks_inside_csv_cells_are_kept_and_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"a\nb","c, ""d"""\ne,"f\r\n\ng"\nh,i\n', encoding="utf-8", newline="")
    records, _ = read_records(str(path), COLUMNS)
    assert [(r.prompt, r.response, r.source) for r in records] == [
        ("a\nb", 'c, "d"', f"{path}:2"),
        ("e", "f\r\n\ng", f"{path}:4"),
        ("h", "i", f"{path}:7"),
    ]


def test_a_line_separator_inside_a_json_text_is_no_line_end(tmp_path):
    path = write_lines(tmp_path, '{"prompt": "a\u2028b", "response": "c\x85d"}', GOOD)
    records, _ = read_records(path, COLUMNS)
    assert [(r.prompt, r.response, r.source) for r in records] == [
        ("a\u2028b", "c\x85d", f"{path}:1"),
        ("问", "答", f"{path}:2"),
    ]


def test_values_are_kept_as_they_are(tmp_path):
    path = write_lines(tmp_path, {"prompt": "  a\n", "response": "\t</s>[gMASK] "})
    assert read_records(path, COLUMNS)[0] == [Record("  a\n", "\t</s>[gMASK] ", (), f"{path}:1")]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is null: write a text or delete the row"),
        ("", "is empty: write a text or delete the row"),
        (" \n\u3000", "is only white space (' \\n\\u3000'): write a text or delete the row"),
        (5, 'is the number 5, not text: put it in double quotes: "5"'),
        (0.5, 'is the number 0.5, not text: put it in double quotes: "0.5"'),
        (True, "is true, not text: write one text"),
        (["a", "b"], "is a list of 2, not text: write one text"),
        ({"role": 1}, "is an object with the keys 'role', not text: write one text"),
        ("ab\ud800", "has half a character (\\ud800, a lone surrogate) as character 3: delete the escape"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "response"])
def test_bad_values_name_line_column_and_fix(tmp_path, column, value, problem):
    path = write_lines(tmp_path, GOOD, {**GOOD, column: value})
    message = refusal(path)
    assert f"{path}: 1 problem in 1 of 2 rows\n" in message
    assert f"\n  {path}:2: {column}: {problem}" in message
    assert message.endswith("\nCorrect them, or go on without these rows: --skip_invalid_rows true")
    message.encode("utf-8")  # raises if the half character itself got into the message


@pytest.mark.parametrize("row", ["12", '"text"', "null", '["a", "b"]'])
def test_a_row_that_is_not_an_object(tmp_path, row):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"prompt": "a", "response": "b"}},\n{row}]', encoding="utf-8")
    what = {"12": "the number 12", '"text"': "text 'text'", "null": "null"}.get(row, "a list of 2")
    assert f'{path}:2: row: is {what}, not an object: write the row as {{"column": "text", …}}' in refusal(path)


def test_an_integer_too_long_for_python_is_a_fault_of_its_row_only(tmp_path):
    path = write_lines(tmp_path, f'{{"prompt": {"9" * 5000}, "response": "b"}}', GOOD)
    assert f"{path}:1: prompt: is the number inf, not text" in refusal(path)
    path = write_lines(tmp_path, f'{{"prompt": "a", "response": "b", "id": {"9" * 5000}}}')
    assert len(read_records(path, COLUMNS)[0]) == 1


def test_a_column_missing_from_one_row(tmp_path):
    path = write_lines(tmp_path, GOOD, {"prompt": "a", "answer": "b"})
    expected = "response: this row has no such column, it has 'prompt', 'answer': add it or delete the row"
    assert f"{path}:2: {expected}" in refusal(path)


def test_a_column_missing_from_all_rows_is_one_error(tmp_path):
    path = write_lines(tmp_path, *[{"content": "a", "responses": "b"}] * 50)
    assert refusal(path, skip_invalid=True).splitlines() == [
        f"{path}:1: prompt: no row has this column, the columns are 'content', 'responses': "
        "set --prompt_column to the name it has in the file",
        f"{path}:1: response: no row has this column, the columns are 'content', 'responses': "
        "set --response_column to the name it has in the file, maybe 'responses'",
    ]


def test_a_csv_with_another_separator(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt|response\na|b\n", encoding="utf-8")
    assert "the columns are 'prompt|response': separate the cells with commas" in refusal(path)


def test_the_response_is_not_read_when_not_asked_for(tmp_path):
    path = write_lines(tmp_path, {"prompt": "a"}, {"prompt": "b", "response": 5})
    records, _ = read_records(path, Columns("prompt", None))
    assert [(r.prompt, r.response) for r in records] == [("a", None), ("b", None)]


def test_ten_problems_are_listed_and_all_are_counted(tmp_path):
    path = write_lines(tmp_path, GOOD, *[{"prompt": "", "response": None}] * 7)
    message = refusal(path).splitlines()
    assert message[0] == f"{path}: 14 problems in 7 of 8 rows"
    assert len(message) == 13
    assert message[10].startswith(f"  {path}:6: response: is null")
    assert message[11] == "  and 4 more"


def test_skip_invalid_returns_the_other_rows_and_the_problems(tmp_path):
    path = write_lines(tmp_path, {**GOOD, "prompt": ""}, GOOD, "{broken", 7)
    records, problems = read_records(path, COLUMNS, skip_invalid=True)
    assert [r.source for r in records] == [f"{path}:2"]
    assert [(p.line, p.field) for p in problems] == [(1, "prompt"), (3, "JSON"), (4, "row")]
    assert problems[0] == Problem(str(path), 1, "prompt", "is empty", "write a text or delete the row")
    assert str(problems[0]) == f"{path}:1: prompt: is empty: write a text or delete the row"


def test_no_row_left_after_skipping_does_not_propose_to_skip(tmp_path):
    message = refusal(write_lines(tmp_path, {**GOOD, "prompt": ""}), skip_invalid=True)
    assert "1 problem in 1 of 1 rows" in message
    assert message.endswith("\nNo valid row is left: correct the file")


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.json", " [ \n] "), ("a.csv", "prompt,response\n")])
def test_a_file_without_rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert refusal(path) == f"{path}: has 0 rows, at least 1 is needed: write rows into it"


def test_max_samples_takes_the_first_valid_rows(tmp_path):
    path = write_lines(tmp_path, {**GOOD, "prompt": ""}, GOOD, GOOD, "{broken", GOOD)
    records, problems = read_records(path, COLUMNS, max_samples=2, skip_invalid=True)
    assert [r.source for r in records] == [f"{path}:2", f"{path}:3"]
    assert [p.line for p in problems] == [1]
    assert len(read_records(path, COLUMNS, max_samples=9, skip_invalid=True)[0]) == 3
    assert "1 problem in 1 of 3 rows" in refusal(path, max_samples=2)


def test_nothing_after_max_samples_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}, {broken', encoding="utf-8")
    assert len(read_records(path, COLUMNS, max_samples=1)[0]) == 1
    assert f"{path}:1: JSON: " in refusal(path, max_samples=3)


@pytest.mark.parametrize("max_samples", [0, -1])
def test_max_samples_below_one(tmp_path, max_samples):
    with pytest.raises(ConfigError, match=f"^max_samples is {max_samples}, the least is 1: give a larger number"):
        read_records(write_lines(tmp_path, GOOD), COLUMNS, max_samples=max_samples)


def test_columns_must_have_different_names():
    with pytest.raises(ConfigError, match=r"^--prompt_column and --history_column are both 'a': name two different"):
        Columns("a", "b", "a")
    with pytest.raises(ConfigError, match=r"^--response_column is '': give the name of a column"):
        Columns("a", "")
