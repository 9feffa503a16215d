"""Tools in training data: the three forms of it are the same record, and what is wrong is named."""

import json

import pytest

from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.data.formats import Record
from ptuning.data.guess import FormatOptions
from ptuning.data.records import read_records
from ptuning.errors import DataError
from ptuning.families import Offer, Part, Turn, dialogue_of
from ptuning.families.chatglm3.tokenizer import ChatGLM3Tokenizer
from tests.conftest import REPO

TOOL = {"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
ARGUMENTS = {"city": "北京"}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
USER = {"role": "user", "content": "天气？"}
END = {"role": "assistant", "content": "15 度。"}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": TEXT}}

FORMS = {
    "openai": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "15"},
            END,
        ],
        "tools": [WRAPPED],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "天气？"},
            {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": ARGUMENTS})},
            {"from": "observation", "value": "15"},
            {"from": "gpt", "value": "15 度。"},
        ],
        "tools": json.dumps([TOOL], ensure_ascii=False),
    },
    "chatglm3": {
        "tools": [TOOL],
        "conversations": [
            USER,
            {"role": "tool", "name": "get_weather", "parameters": ARGUMENTS, "observation": 15},
            END,
        ],
    },
    "tools in the system message": {
        "conversations": [
            {"role": "system", "content": "", "tools": [TOOL]},
            USER,
            {"role": "assistant", "metadata": "get_weather", "content": TEXT},
            {"role": "observation", "content": "15"},
            END,
        ]
    },
}
CALLED = Turn.of([Part("assistant", TEXT, "get_weather")])
HISTORY = (("天气？", CALLED),)


def read(folder, *rows) -> list[Record]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return read_records(path, FormatOptions())[0]


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_one_dialogue_in_each_form(tmp_path, row):
    (record,) = read(tmp_path, row)
    result = Turn.of([Part("observation", "15")])
    assert record == Record(result, "15 度。", HISTORY, f"{tmp_path}/a.jsonl:1", Offer.of("", [TOOL]))
    assert record.prompt.parts == result.parts and record.history[0][1].parts == CALLED.parts
    assert record.system.tools == (TOOL,) and record.system.said == ""
    template = ChatGLM3Tokenizer(str(REPO / "models" / "chatglm2-tiny" / "tokenizer.model")).template()
    (encoded,), _ = Encoder(template, Lengths(400, 20), loss_on="all").training_rows([record])
    encode, roles, line = template.encode_text, template.role_ids, template.encode_text(["\n"])[0]
    name, code = encode(["get_weather\n", "```python\ntool_call(city='北京')\n```"])
    end = [*line, *encode(["15 度。"])[0], 2]
    assert [label for label in encoded.labels if label != IGNORE] == [*name, *code, roles["observation"], *end]
    assert encoded.input_ids.count(roles["system"]) == 1


def test_messages_of_one_side_are_one_turn_where_tools_are_used(tmp_path):
    messages = [
        USER,
        {"role": "assistant", "content": "查一下", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "15"},
        {"role": "tool", "content": {"value": 16}},
        {"role": "assistant", "content": "再查"},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    (record,) = read(tmp_path, {"messages": messages})
    assert [part.text for part in record.history[0][1].parts] == ["查一下", TEXT, TEXT]
    assert [part.text for part in record.prompt.parts] == ["15", '{"value": 16}']
    assert [(part.text, part.call) for part in record.response.parts] == [("再查", ""), (TEXT, "get_weather")]
    assert type(record.history[0][0]) is str and record.system is None


def test_the_chat_template_takes_chatglm3_s_own_form(tmp_path):
    (record,) = read(tmp_path, FORMS["tools in the system message"])
    dialogue = dialogue_of(FORMS["tools in the system message"]["conversations"])
    assert dialogue == record.dialogue() and dialogue.prompt.parts == record.prompt.parts
    assert dialogue.system.tools == record.system.tools


@pytest.mark.parametrize(
    ("messages", "tools", "problem"),
    [
        (
            [USER, {"role": "observation", "content": "15"}, END],
            None,
            "messages: message 2 is what a tool returned, and no call stands before it: write the assistant's call",
        ),
        ([{"role": "tool", "content": "15"}, END], None, "message 1 is what a tool returned, and no call"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}],
            None,
            "the tool_calls of message 2 hold an object with the keys 'function': write each as",
        ),
        (
            [USER, {"role": "function_call", "content": "f(1)"}],
            None,
            "the function_call of message 2 is text 'f(1)': write it as",
        ),
        (
            [USER, {"role": "tool", "name": "", "parameters": {}}, END],
            None,
            "the name of message 2 is empty: write the name of the tool",
        ),
        ([USER, END], "weather", "tools: is text 'weather', not a list of tools: write it as"),
        ([USER, END], {"name": "f"}, "tools: is an object with the keys 'name', not a list of tools"),
        ([USER, {"role": "assistant", "content": None}], None, "the content of message 2 is null"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, messages, tools, problem):
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"messages": messages} | ({} if tools is None else {"tools": tools}))
    assert problem in str(caught.value) and "a.jsonl:1: " in str(caught.value)
