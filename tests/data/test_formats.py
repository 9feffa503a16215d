"""Chat formats and guessed columns: the same conversation is the same record, and what is wrong is named."""

import csv
import json
from pathlib import Path
from typing import ClassVar

import pytest

from ptuning.data.encode import Encoder, Lengths
from ptuning.data.formats import FORMATS, Columns, Record
from ptuning.data.guess import FormatOptions, find_format
from ptuning.data.records import read_records
from ptuning.data.splits import load_split
from ptuning.errors import ConfigError, DataError
from ptuning.families import dialogue_of
from ptuning.families.chatglm2.template import ChatGLM2Template, build_prompt

HISTORY = [["早", "早！"], ["有裙子吗？", "有。"]]
MESSAGES = [
    {"role": "user", "content": "早"},
    {"role": "assistant", "content": "早！"},
    {"role": "user", "content": "有裙子吗？"},
    {"role": "assistant", "content": "有。"},
    {"role": "user", "content": "红的"},
    {"role": "assistant", "content": "也有"},
]
SYSTEM = {"role": "system", "content": "你是店员。"}
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
GUESSED = FormatOptions()


def sharegpt(messages: list[dict]) -> list[dict]:
    return [{"from": NAMES[m["role"]], "value": m["content"]} for m in messages]


def write(folder: Path, *rows: object, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def only_record(path: Path, layout: FormatOptions = GUESSED) -> Record:
    (record,), _ = read_records(path, layout)
    return record


def refusal(path: Path, layout: FormatOptions | Columns = GUESSED, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, layout, **options)
    return str(caught.value)


FORMS = {
    "sharegpt": {"conversations": sharegpt(MESSAGES)},
    "sharegpt with user and assistant": {
        "conversations": [{"from": m["role"], "value": m["content"]} for m in MESSAGES],
    },
    "ChatGLM3": {"conversations": MESSAGES},
    "openai": {"messages": MESSAGES},
    "alpaca": {"instruction": "红的", "input": "", "output": "也有", "history": HISTORY},
    "columns": {"question": "红的", "answer": "也有", "history": HISTORY},
    "columns in Chinese": {"问题": "红的", "回答": "也有", "历史": HISTORY},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_one_conversation_in_each_format_is_the_same_record_and_the_same_ids(tmp_path, tiny_tokenizer, row, name):
    path = write(tmp_path, row)
    if name == "a.csv":
        path = tmp_path / name
        cells = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in row.values()]
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([list(row), cells])
    record = only_record(path)
    expected = Record("红的", "也有", tuple(map(tuple, HISTORY)), f"{path}:{2 if name == 'a.csv' else 1}")
    assert record == expected
    encoder = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(200, 20), loss_on="all")
    assert encoder.training_rows([record])[0] == encoder.training_rows([expected])[0]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": sharegpt([SYSTEM, *MESSAGES])},
        {"conversations": sharegpt(MESSAGES), "system": "你是店员。"},
        {"messages": [SYSTEM, *MESSAGES]},
        {"instruction": "红的", "input": None, "output": "也有", "history": HISTORY, "system": "你是店员。"},
    ],
)
def test_a_system_text_stands_in_front_of_the_prompt(tmp_path, tiny_tokenizer, row):
    record = only_record(write(tmp_path, row))
    assert record.system == "你是店员。"
    (encoded,), _ = Encoder(ChatGLM2Template(tiny_tokenizer), Lengths(300, 20)).prompt_rows([record])
    assert encoded.input_ids == tiny_tokenizer(build_prompt("红的", HISTORY, "你是店员。")).input_ids
    assert encoded.input_ids == tiny_tokenizer.apply_chat_template([SYSTEM, *MESSAGES[:-1]])


@pytest.mark.parametrize("system", ["", "  ", None])
def test_a_blank_system_text_is_none(tmp_path, system):
    assert only_record(write(tmp_path, {"messages": [{"role": "system", "content": system}, *MESSAGES]})).system is None
    assert only_record(write(tmp_path, {"conversations": MESSAGES, "system": system})).system is None


def test_messages_mean_what_the_chat_template_takes_them_for(tmp_path):
    record = only_record(write(tmp_path, {"messages": [SYSTEM, *MESSAGES]}))
    assert record.dialogue() == dialogue_of([SYSTEM, *MESSAGES])


def test_an_alpaca_input_follows_the_instruction_on_a_line_of_its_own(tmp_path):
    path = write(
        tmp_path, {"instruction": "翻译", "input": "red", "output": "红"}, {"instruction": "你好", "output": "好"}
    )
    records, _ = read_records(path, FormatOptions())
    assert [r.prompt for r in records] == ["翻译\nred", "你好"]


USER, ASSISTANT = MESSAGES[4:]
WRITE = 'write it as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "is an empty list: write at least one question and its answer, or delete the row"),
        ("你好", f"is text '你好', not a list of messages: {WRITE}"),
        ([USER, "也有"], f"message 2 is text '也有', without from or role: {WRITE}"),
        (
            [USER, USER, ASSISTANT],
            "messages 1 and 2 are both the user's: join them into one message, or delete the row",
        ),
        ([SYSTEM, USER, ASSISTANT, ASSISTANT], "messages 3 and 4 are both the assistant's: join them"),
        ([ASSISTANT], "message 1, the first, is the assistant's: start with a question, or delete the row"),
        ([SYSTEM, ASSISTANT], "message 2, the first, is the assistant's"),
        ([USER], "message 1, the last, is the user's: add the answer, or delete that message"),
        ([SYSTEM, USER, ASSISTANT, USER], "message 4, the last, is the user's"),
        ([SYSTEM], "holds a system message only: add a question and its answer, or delete the row"),
        ([USER, ASSISTANT, SYSTEM], "message 3 is a system message: put it first, once, or delete the row"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "message 2 is a system message: put it first"),
        (
            [USER, {"role": "critic", "content": "x"}],
            "the role of message 2 is text 'critic': use user, assistant or system, or delete the row",
        ),
        ([{"from": "bing", "value": "x"}], "the from of message 1 is text 'bing': use human, gpt or system"),
        ([{"from": ["gpt"], "value": "x"}], "the from of message 1 is a list of 1: use human, gpt or system"),
        ([USER, {"role": "assistant"}], "message 2 has no content: write its text or delete the row"),
        ([USER, ASSISTANT | {"content": None}], "the content of message 2 is null: write a text or delete the row"),
        ([{"from": "human", "value": " "}], "the value of message 1 is only white space (' ')"),
        ([USER | {"content": [{"type": "text"}]}], "the content of message 1 is a list of 1, not text: write one text"),
    ],
)
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_bad_conversations(tmp_path, column, messages, problem):
    path = write(tmp_path, {column: [USER, ASSISTANT]}, {column: messages})
    assert f"\n  {path}:2: {column}: {problem}" in refusal(path)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": MESSAGES, "system": 5}, "system: is the number 5, not text"),
        (
            {"conversations": [SYSTEM, *MESSAGES], "system": "短答"},
            "system: the row has a system text, and a system message in its conversation: keep one of the two",
        ),
        ({"text": "x"}, "conversations: this row has no such column, it has 'text': add it or delete the row"),
    ],
)
def test_bad_rows_of_conversations(tmp_path, row, problem):
    path = write(tmp_path, {"conversations": MESSAGES}, row)
    assert f"\n  {path}:2: {problem}" in refusal(path)


def test_bad_alpaca_rows(tmp_path):
    good = {"instruction": "a", "input": "b", "output": "c"}
    bad = {"instruction": "a", "input": 5, "output": "", "history": "x"}
    path = write(tmp_path, good, bad, {"output": "c"})
    message = refusal(path)
    for problem in (
        f"{path}:2: output: is empty: write a text or delete the row",
        f"{path}:2: input: is the number 5, not text",
        f"{path}:2: history: is text 'x', not a list of [question, answer] pairs",
        f"{path}:3: instruction: this row has no such column, it has 'output'",
    ):
        assert problem in message


def test_a_conversation_in_csv_that_is_not_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('messages\n"[{"\n', encoding="utf-8")
    assert f"{path}:2: messages: the cell is not JSON" in refusal(path)
    assert 'write it as [{"role": "user", "content": "…"}, …], each quote doubled as CSV wants it' in refusal(path)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"content": "a", "summary": "b"}, "columns prompt 'content', response 'summary', guessed"),
        ({"id": 1, "Question": "a", "Answer": "b"}, "columns prompt 'Question', response 'Answer', guessed"),
        (
            {"query": "a", "response": "b", "history": []},
            "columns prompt 'query', response 'response', history 'history'",
        ),
        ({"input": "a", "output": "b"}, "columns prompt 'input', response 'output', guessed"),
        ({"instruction": "a", "output": "b"}, "Alpaca instruction, input, output, guessed"),
        ({"conversations": MESSAGES, "id": 1}, "ShareGPT conversations, guessed"),
        ({"messages": MESSAGES, "prompt": "a"}, "OpenAI messages, guessed"),
        # a history of another kind is left alone
        ({"prompt": "a", "response": "b", "history": "古代"}, "columns prompt 'prompt', response 'response', guessed"),
    ],
)
def test_what_is_guessed_is_said(tmp_path, row, found):
    path = write(tmp_path, row)
    split = load_split("train", str(path), FormatOptions())
    assert str(split).startswith(f"train: 1 rows of {path} ({found}")


def test_what_is_named_is_not_guessed(tmp_path):
    path = write(tmp_path, {"prompt": "a", "response": "b", "question": "c", "answer": "d", "history": [["e", "f"]]})
    split = load_split("train", str(path), FormatOptions(prompt="question", response="answer"))
    assert str(split) == f"train: 1 rows of {path}"
    assert split.records == [Record("c", "d", (), f"{path}:1")]
    assert only_record(path, FormatOptions(prompt="prompt", response="response", history="history")).history == (
        ("e", "f"),
    )
    half = find_format(path, FormatOptions(prompt="prompt", response="answer"))
    assert half.shape == Columns("prompt", "answer") and not half.guessed


def test_the_column_that_is_not_named_is_guessed(tmp_path):
    path = write(tmp_path, {"frage": "a", "answer": "b"})
    assert only_record(path, FormatOptions(prompt="frage")).response == "b"
    path = write(tmp_path, {"question": "a", "antwort": "b"})
    assert only_record(path, FormatOptions(response="antwort")).prompt == "a"


def test_a_guessed_history_may_begin_after_the_first_rows(tmp_path):
    path = write(
        tmp_path, *[{"prompt": "a", "response": "b"}] * 150, {"prompt": "a", "response": "b", "history": HISTORY}
    )
    split = load_split("train", str(path), FormatOptions())
    assert split.records[-1].history == tuple(map(tuple, HISTORY))
    assert str(split).endswith("(columns prompt 'prompt', response 'response', guessed)")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_one_bad_history_is_named_and_the_others_are_kept(tmp_path, name):
    rows = [{"prompt": "a", "response": "b", "history": HISTORY} for _ in range(50)]
    rows[20]["history"] = "古代"
    path = write(tmp_path, *rows)
    if name == "a.csv":
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["prompt", "response", "history"]])
            csv.writer(file).writerows(
                [row["prompt"], row["response"], h if isinstance(h := row["history"], str) else json.dumps(h)]
                for row in rows
            )
    line = 22 if name == "a.csv" else 21
    assert f"\n  {path}:{line}: history: " in refusal(path)
    records, problems = read_records(path, FormatOptions(), skip_invalid=True)
    assert len(records) == 49 and len(problems) == 1
    assert all(record.history == tuple(map(tuple, HISTORY)) for record in records)


def test_a_new_format_is_one_class_and_its_name(tmp_path, monkeypatch):
    class Dolly:
        owns_columns = False
        json_columns: ClassVar = {}
        needed: ClassVar = [("--data_format", "say"), ("--data_format", "reply")]

        def __str__(self):
            return "Dolly say, reply"

        def fits(self, rows):
            return any("say" in row for row in rows)

        def read(self, row, source):
            return Record(row["say"], row["reply"], (), source)

    monkeypatch.setitem(FORMATS, "dolly", Dolly())
    path = write(tmp_path, {"say": "a", "reply": "b"})
    assert str(load_split("train", str(path), FormatOptions())).endswith("(Dolly say, reply, guessed)")
    assert only_record(path, FormatOptions("dolly")) == Record("a", "b", (), f"{path}:1")
    assert "set --data_format to sharegpt, openai, alpaca or dolly" in refusal(write(tmp_path, {"x": "y"}))


def test_a_format_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"^--data_format is 'sharegp', use one of auto, columns, .*mean sharegpt\?$"):
        FormatOptions("sharegp")


def test_columns_that_cannot_be_guessed_are_listed_with_the_flags(tmp_path):
    path = write(tmp_path, {"frage": "a", "antwort": "b"})
    assert refusal(path) == (
        f"{path}:1: row: no known prompt and response column, the columns are 'frage', 'antwort': name them with "
        "--prompt_column and --response_column, or set --data_format to sharegpt, openai or alpaca"
    )
    assert refusal(path, FormatOptions("columns")).endswith("name them with --prompt_column and --response_column")
    assert "no known response column, the columns are 'frage', 'antwort'" in refusal(
        path, FormatOptions(prompt="frage")
    )


def test_columns_that_can_be_read_in_two_ways_are_not_guessed(tmp_path):
    path = write(tmp_path, {"question": "a", "answer": "b", "response": "c"})
    message = refusal(path)
    assert message.startswith(f"{path}:1: row: the rows can be read in more than one way: columns prompt 'question'")
    assert "response 'answer', history 'history' or columns prompt 'question', response 'response'" in message
    path = write(tmp_path, {"messages": MESSAGES, "conversations": MESSAGES})
    assert "ShareGPT conversations or OpenAI messages: name them" in refusal(path)


def test_a_named_column_that_is_nowhere(tmp_path):
    path = write(tmp_path, {"question": "a", "answer": "b"})
    assert refusal(path, FormatOptions(prompt="questions")) == (
        f"{path}:1: questions: no row has this column, the columns are 'question', 'answer': set --prompt_column to the name "
        "it has in the file, maybe 'question'"
    )
    assert refusal(path, FormatOptions("openai")) == (
        f"{path}:1: messages: no row has this column, the columns are 'question', 'answer': set --data_format to the format "
        "of the file, or leave it out to have it guessed"
    )


def test_a_chat_format_has_no_columns_to_name():
    with pytest.raises(
        ConfigError, match=r"^--data_format openai with --prompt_column q: that format has its own column"
    ):
        FormatOptions("openai", prompt="q")


def test_rows_that_are_all_broken_are_reported_as_such(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n5\n", encoding="utf-8")
    message = refusal(path)
    assert f"{path}: 2 problems in 2 of 2 rows" in message and f"{path}:2: row: is the number 5" in message
