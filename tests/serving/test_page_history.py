"""Editing and downloading a conversation; the texts in two languages."""

import json
import re
import string

import pytest

from ptuning.data.formats import Columns
from ptuning.data.records import read_records
from tests.serving.page_modules import FOLDER, history, texts

Reply, Turn = history.Reply, history.Turn


@pytest.fixture
def turns() -> list:
    """Whole, compared, stopped, failed, whole."""
    return [
        Turn("q1", {"a": Reply("a1", "base")}),
        Turn("q2", {"a": Reply("a2", "base"), "b": Reply("b2", "ads")}),
        Turn("q3", {"a": Reply("a3", "base", cut="stopped"), "b": Reply("b3", "ads")}),
        Turn("q4", {"a": Reply("", "base", cut="problem", problem=("cut", {}))}),
        Turn("q5", {"a": Reply("a5", "base")}),
    ]


def test_each_side_sees_its_own_answers(turns):
    assert history.pairs(turns, "a") == [["q1", "a1"], ["q2", "a2"], ["q3", "a3"], ["q5", "a5"]]
    assert history.pairs(turns, "b") == [["q1", "a1"], ["q2", "b2"], ["q3", "b3"], ["q5", "a5"]]


def test_messages_alternate(turns):
    found = history.messages(turns, "b", "q6", system="Be brief.")
    assert [m["role"] for m in found] == ["system", *["user", "assistant"] * 4, "user"]
    assert found[0]["content"] == "Be brief."
    assert found[-1]["content"] == "q6"
    assert history.messages([], "a", "q", system=" \n") == [{"role": "user", "content": "q"}]


def test_rows_leave_out_what_is_not_whole(turns):
    assert [row["response"] for row in history.training_rows(turns, "a")] == ["a1", "a2", "a5"]
    assert [row["response"] for row in history.training_rows(turns, "b")] == ["b2", "b3"]
    turns = history.edited(turns, 2, "a", "a3, whole")
    rows = history.training_rows(turns, "a")
    assert rows[2] == {"prompt": "q3", "response": "a3, whole", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert rows[3]["history"][2] == ["q3", "a3, whole"]


def test_rows_are_read_by_training(turns, tmp_path):
    turns[0] = Turn('多行\n问题 \u2028 "引号" \'', {"a": Reply("类型#上衣*材质", "base")})
    rows = history.training_rows(turns, "a")
    file = tmp_path / "train.json"
    file.write_text(history.as_json_lines(rows), encoding="utf-8")
    records, problems = read_records(file, Columns("prompt", "response", "history"))
    assert not problems
    assert [record.prompt for record in records] == [row["prompt"] for row in rows]
    assert [record.response for record in records] == [row["response"] for row in rows]
    assert [[list(pair) for pair in record.history] for record in records] == [row["history"] for row in rows]


def test_the_same_text_is_no_edit(turns):
    assert history.edited(turns, 2, "a", "a3")[2] == turns[2]


def test_edits_change_nothing_in_place(turns):
    before = json.dumps(history.as_json(turns, "", {}))
    history.edited(turns, 0, "a", "new")
    history.with_question(turns, 0, "new")
    history.without(turns, 0)
    history.with_reply(turns, 0, "b", Reply("new", "ads"))
    assert json.dumps(history.as_json(turns, "", {})) == before


def test_the_chat_download(turns):
    told = json.loads(history.as_json(turns, "Be brief.", {"temperature": 0.0}))
    assert told["system"] == "Be brief."
    assert told["settings"] == {"temperature": 0.0}
    assert told["turns"][2] == {
        "question": "q3",
        "answers": [
            {"side": "a", "model": "base", "text": "a3", "state": "stopped"},
            {"side": "b", "model": "ads", "text": "b3", "state": "whole"},
        ],
    }


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_the_same():
    chinese, english = texts.TEXTS["zh"], texts.TEXTS["en"]
    assert set(chinese) == set(english)
    for name, words in chinese.items():
        assert words.strip(), name
        assert english[name].strip(), name
        assert fields(words) == fields(english[name]), name
        assert not re.search("[\u3000-\u9fff\uff00-\uffef]", english[name]), name


def test_no_text_is_missing_or_left_over():
    source = "".join(path.read_text("utf-8") for path in FOLDER.glob("page*.py") if path.name != "page_texts.py")
    raised = set(re.findall(r'ApiProblem\(\s*"(\w+)"', source))
    assert {f"problem_{kind}" for kind in raised} <= set(texts.TEXTS["zh"])
    assert set(re.findall(r'\bsay\("(\w+)"', source)) <= set(texts.TEXTS["zh"])
    quoted = set(re.findall(r"""["'](\w+)["']""", source))
    assert not {name for name in texts.TEXTS["zh"] if name.removeprefix("problem_") not in quoted}
