"""Past turns become (question, answer) pairs, and a history of another shape is named by turn."""

import json
from pathlib import Path

import pytest

from ptuning.data.formats import Columns
from ptuning.data.records import read_records
from ptuning.errors import DataError

CHAT = Columns("prompt", "response", "history")
GOOD = {"prompt": "问", "response": "答"}
PAIRS = 'write the history as [["question", "answer"], …], oldest first'


def write_lines(folder: Path, *rows: object) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, CHAT, **options)
    return str(caught.value)


@pytest.mark.parametrize("history", [None, "", " ", [], "absent"])
def test_what_stands_for_no_history(tmp_path, history):
    row = GOOD if history == "absent" else {**GOOD, "history": history}
    path = write_lines(tmp_path, row, {**GOOD, "history": [["a", "b"], ["c", "d"]]})
    records, _ = read_records(path, CHAT)
    assert [r.history for r in records] == [(), (("a", "b"), ("c", "d"))]


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ("a", f"is text 'a', not a list of [question, answer] pairs: {PAIRS}"),
        ({"a": 1}, f"is an object with the keys 'a', not a list of [question, answer] pairs: {PAIRS}"),
        (["a", "b"], f"turn 1 is text 'a', not a pair [question, answer]: {PAIRS}"),
        ([["a", "b"], ["c"]], f"turn 2 is a list of 1, not a pair [question, answer]: {PAIRS}"),
        ([{"role": "user", "content": "a"}], "turn 1 is an object with the keys 'role', 'content', not a pair"),
        ([["a", ""]], "the answer of turn 1 is empty: write a text or delete the turn"),
        ([["a", "b"], ["  ", "d"]], "the question of turn 2 is only white space ('  '): write a text or delete"),
        ([["a", 1]], 'the answer of turn 1 is the number 1, not text: put it in double quotes: "1"'),
        ([["a", "\udfff"]], "the answer of turn 1 has half a character (\\udfff, a lone surrogate)"),
    ],
)
def test_bad_histories(tmp_path, history, problem):
    path = write_lines(tmp_path, {**GOOD, "history": []}, {**GOOD, "history": history})
    assert f"{path}:2: history: {problem}" in refusal(path)


def test_a_history_column_absent_from_all_rows_is_refused_even_when_skipping(tmp_path):
    path = write_lines(tmp_path, *[{**GOOD, "historys": []}] * 3)
    expected = "no row has this column, the columns are 'prompt', 'response', 'historys': set --history_column"
    message = refusal(path, skip_invalid=True)
    assert message.startswith(f"{path}:1: history: {expected}")
    assert message.endswith("maybe 'historys'")


def test_a_history_column_that_starts_after_max_samples_is_no_misspelling(tmp_path):
    path = write_lines(tmp_path, GOOD, GOOD, "{broken", {**GOOD, "history": 5})
    assert len(read_records(path, CHAT, max_samples=1)[0]) == 1


def test_histories_in_csv_are_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response,history\na,b,"[[""问"", ""答""]]"\na,b,\na,b,null\n', encoding="utf-8")
    assert [r.history for r in read_records(path, CHAT)[0]] == [(("问", "答"),), (), ()]


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("[[1", "the cell is not JSON (Expecting ',' delimiter at character 4 of '[[1'): write it as [["),
        ('"[[""a""]]"', "turn 1 is a list of 1, not a pair [question, answer]"),
        ("5", "is the number 5, not a list of [question, answer] pairs"),
        ("[" * 100_000, "the brackets are nested too deeply to be read"),
    ],
)
def test_bad_histories_in_csv(tmp_path, cell, problem):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response,history\na,b,[]\na,b,{cell}\n", encoding="utf-8")
    message = refusal(path)
    assert f"{path}:3: " in message
    assert problem in message
