"""What clients that people use send, and what they expect back."""

import codecs
import json
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from ptuning.errors import ConfigError
from ptuning.families import Part
from ptuning.families.chatglm2.template import build_prompt
from ptuning.serving.errors import ApiError
from ptuning.serving.messages import dialogue_from
from ptuning.serving.openai_schema import Message
from ptuning.serving.options import parse
from tests.serving.conftest import ADMIN, running

KEY = {"Authorization": f"Bearer {ADMIN}"}
SAY = [{"role": "user", "content": "你好"}]
CHAT = {"model": "base", "messages": SAY, "temperature": 0, "max_tokens": 12}
BODIES = sorted((Path(__file__).parent / "client_bodies").glob("*.json"))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# --- messages in any order ----------------------------------------------------------------------------------------------


def said(*messages: tuple[str, str | None]):
    dialogue = dialogue_from([Message(role=role, content=content) for role, content in messages])
    return dialogue.system, dialogue.history, dialogue.prompt


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("system", "a"), ("developer", "b"), ("user", "c")], ("a\nb", (), "c")),
        ([("user", "a"), ("system", "b"), ("user", "c")], (None, (), "a\nb\nc")),
        ([("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")], (None, (("a", "b"),), "c\nd")),
        ([("user", "a"), ("user", "b")], (None, (), "a\nb")),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")], (None, (("a", "b\nc"),), "d")),
        ([("assistant", "a"), ("user", "b")], (None, (("", "a"),), "b")),
        ([("system", "s"), ("assistant", "a"), ("user", "b")], ("s", (("", "a"),), "b")),
        ([("user", "a"), ("assistant", None), ("tool", "b")], (None, (("a", ""),), "工具返回：b")),
        ([("system", "a")], (None, (), "a")),
    ],
)
def test_any_order_of_roles(messages, expected):
    assert said(*messages) == expected


def test_the_last_word_is_not_the_models():
    with pytest.raises(ApiError, match=r"messages\[1\]: role is 'assistant'; the last message must be the user's"):
        said(("user", "a"), ("assistant", "b"))


def test_a_tool_call_is_told_in_words():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    messages = [
        Message(role="user", content="天气？"),
        Message(role="assistant", content=None, tool_calls=[call]),
        Message(role="tool", content="晴"),
    ]
    dialogue = dialogue_from(messages)
    assert (
        dialogue.history == (("天气？", '调用工具：weather({"city": "北京"})'),) and dialogue.prompt == "工具返回：晴"
    )
    called, returned = dialogue.history[0][1], dialogue.prompt  # for a template that has roles for them
    assert called.parts == (Part("assistant", '{"city": "北京"}', "weather"),)
    assert returned.parts == (Part("observation", "晴"),)
    odd = dialogue_from([messages[0], Message(role="assistant", tool_calls=[{"function": 3}]), messages[2]])
    assert odd.history[0][1] == '调用工具：{"function": 3}'


def test_fields_of_messages_that_mean_nothing_here(client):
    plain = client.chat.completions.create(**CHAT)
    more = {"name": "me", "id": "1", "provider_specific_fields": {"a": 1}, "annotations": [{}], "audio": {"id": "x"}}
    part = {"type": "text", "text": "你好", "cache_control": {"type": "ephemeral"}}
    dressed = client.chat.completions.create(**CHAT | {"messages": [{"role": "user", "content": [part], **more}]})
    assert dressed.choices[0].message == plain.choices[0].message and dressed.usage == plain.usage


# --- fields of requests -------------------------------------------------------------------------------------------------


def test_fields_that_change_nothing(client):
    plain = client.chat.completions.create(**CHAT)
    same = client.chat.completions.create(
        **CHAT | {"max_tokens": 12.0},
        store=True,
        metadata={"a": "b"},
        service_tier="flex",
        user="me",
        reasoning_effort="high",
        verbosity="low",
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        tool_choice="auto",
        response_format={"type": "text"},
        extra_body={"prompt_cache_retention": "24h", "top_k": -1, "min_p": 0, "repetition_penalty": 1, "best_of": 1},
    )
    assert same.choices[0].message.content == plain.choices[0].message.content and same.usage == plain.usage


def test_top_k_min_p_and_repetition_penalty(client):
    greedy = client.chat.completions.create(**CHAT).choices[0].message.content
    hot = CHAT | {"temperature": 2, "top_p": 1, "seed": 3}
    free = client.chat.completions.create(**hot).choices[0].message.content
    assert free != greedy
    for narrow in ({"top_k": 1}, {"min_p": 1}):
        assert client.chat.completions.create(**hot, extra_body=narrow).choices[0].message.content == greedy
    body = CHAT | {"model": "ads", "max_tokens": 40}
    texts = [
        client.chat.completions.create(**body, extra_body={"repetition_penalty": penalty}).choices[0].message.content
        for penalty in (1, 5)
    ]
    assert texts[0] != texts[1] and len(set(texts[1])) / len(texts[1]) > len(set(texts[0])) / len(texts[0])


def test_best_of_gives_the_likeliest(client):
    body = {"model": "base", "prompt": "问：你好\n\n答：", "temperature": 2, "top_p": 1, "seed": 5, "max_tokens": 6}

    def likelihood(choice):
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    made = client.completions.create(**body, n=6, logprobs=0).choices
    ranked = sorted(made, key=likelihood, reverse=True)
    best = client.completions.create(**body, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1] and best.choices[0].logprobs is None


# --- answers of a form --------------------------------------------------------------------------------------------------

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install ptuning[serve]")


@pytest.mark.parametrize("model", ["base", "ads", "talk"])
@pytest.mark.parametrize("temperature", [0, 2])
def test_json_of_a_schema_with_any_prefix(client, model, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
    body = CHAT | {"model": model, "temperature": temperature, "max_tokens": 120, "seed": 1}
    choice = client.chat.completions.create(**body, response_format=form).choices[0]
    made = json.loads(choice.message.content)
    assert choice.finish_reason == "stop" and set(made) == {"name", "count"}
    assert isinstance(made["name"], str) and len(made["name"]) <= 8 and 0 <= made["count"] <= 99


def test_a_choice_in_a_stream_beside_a_free_answer(client):
    texts = ["是的", "不是", "不知道。"]
    stream = client.chat.completions.create(**CHAT, stream=True, n=2, extra_body={"guided_choice": texts})
    answers = {0: "", 1: ""}
    for chunk in stream:
        answers[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert answers[0] == answers[1] and answers[0] in texts
    assert client.chat.completions.create(**CHAT).choices[0].message.content.startswith("你好！")


def test_any_json_object(client):
    body = CHAT | {"temperature": 1, "seed": 2, "max_tokens": 300}
    choice = client.chat.completions.create(**body, response_format={"type": "json_object"}).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


# --- tokens, names, what is refused -------------------------------------------------------------------------------------


def test_tokenize_and_detokenize(server):
    template = server.worker.template
    made = server.post("/tokenize", {"model": "base", "prompt": "你好", "return_token_strs": True}).json()
    assert made["tokens"] == [*template.begin_ids, *template.encode_text(["你好"])[0]]
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"]) and made["max_model_len"] == 2048
    bare = server.post("/tokenize", {"prompt": "你好", "add_special_tokens": False}).json()["tokens"]
    assert server.post("/detokenize", {"model": "ads", "tokens": bare}).json() == {"prompt": "你好"}
    chat = server.post("/tokenize", {"model": "base", "messages": SAY}).json()["tokens"]
    assert chat == [*template.begin_ids, *template.encode_text([build_prompt("你好")])[0]]
    for path, body, text in (
        ("/tokenize", {"model": "base"}, "either prompt or messages"),
        ("/detokenize", {"tokens": [10**9]}, "there is no token 1000000000"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/tokenize", {"model": "nobody", "prompt": "a"}, "there is no model 'nobody'"),
    ):
        answer = server.post(path, body)
        assert answer.status_code in (400, 404) and text in answer.json()["error"]["message"]


def test_embeddings_are_refused_by_name(client):
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="base", input="a")


def test_served_model_names(prefix_folders):
    names = (("chatglm2-6b", ""), ("glm", ""), ("gpt-4o", "ads"))
    with running({"ads": prefix_folders["ads"]}, served_model_name=names) as server:
        listed = [model["id"] for model in server.get("/v1/models").json()["data"]]
        assert listed == ["chatglm2-6b", "ads"]
        texts = {name: server.chat(model=name).json() for name in ("base", "chatglm2-6b", "glm", "chatglm2-tiny")}
        assert {made["model"] for made in texts.values()} == {"chatglm2-6b"}
        assert server.chat(model="gpt-4o").json()["model"] == "ads"
        taken = server.post("/v1/prefixes", {"name": "glm", "path": "/x"}, headers=KEY)
        assert taken.status_code == 409 and "--served_model_name" in taken.text
    with (
        pytest.raises(ConfigError, match="--served_model_name a=nobody: there is no model"),
        running({}, served_model_name=(("a", "nobody"),)),
    ):
        pass
    assert parse(["--served_model_name", "a", "--served_model_name", "b=c"]).served_model_name == (
        ("a", ""),
        ("b", "c"),
    )
    with pytest.raises(ConfigError, match="expected NAME"):
        parse(["--served_model_name", "a="])


def test_the_default_stays_answerable_when_its_prefix_is_removed(prefix_folders):
    with running({"ads": prefix_folders["ads"]}) as server:
        assert server.post("/chatglm", {"prompt": "你好", "max_length": 60}).headers["x-model"] == "ads"
        removed = httpx.delete(f"{server.url}/v1/prefixes/ads", headers=KEY, timeout=120).json()
        assert removed["deleted"] and removed["default_model"] == "chatglm2-tiny"
        answer = server.post("/chatglm", {"prompt": "你好", "max_length": 60})
        assert answer.status_code == 200 and answer.headers["x-model"] == "chatglm2-tiny"
        assert server.post("/chatglm", {"prompt": "你好", "model": "ads"}).status_code == 404
        server.post("/v1/prefixes", {"name": "ads", "path": str(prefix_folders["ads"])}, headers=KEY)
        assert server.post("/chatglm", {"prompt": "你好", "max_length": 60}).headers["x-model"] == "ads"


# --- whole clients ------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark(server):
    for path, body in (("/chatglm", {"prompt": "你好", "max_length": 60}), ("/v1/chat/completions", CHAT)):
        assert server.post(path, codecs.BOM_UTF8 + json.dumps(body).encode()).status_code == 200


def test_the_clients_of_the_official_servers(server):
    """api.py reads what it knows of the body, openai_api.py's client names chatglm2-6b and streams."""
    official = {
        "prompt": "你好",
        "history": [],
        "max_length": 2048,
        "top_p": 0.7,
        "temperature": 0.95,
        "top_k": 5,
        "x": {},
    }
    answer = server.post("/", official).json()
    assert answer["status"] == 200 and answer["history"] == [["你好", answer["response"]]]


@pytest.mark.parametrize("file", BODIES, ids=[file.stem for file in BODIES])
def test_bodies_of_web_front_ends(server, file):
    body = json.loads(file.read_text("utf-8")) | {"model": "ads"}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"content"' in answer.text
    else:
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"


class Thing(BaseModel):
    """As LangChain's users describe what they want."""

    name: str = Field(max_length=8)
    count: int = Field(ge=0, le=99)


def test_langchain(server):
    from langchain_openai import ChatOpenAI

    there = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "ads", "max_retries": 0, "temperature": 0}
    model = ChatOpenAI(**there, max_tokens=100)
    whole = model.invoke([("system", "a"), ("human", "你好")])
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream([("system", "a"), ("human", "你好")])) == whole.content
    made = model.with_structured_output(SCHEMA | {"title": "Thing"}, method="json_schema").invoke("你好")
    assert set(made) == {"name", "count"}
    made = model.with_structured_output(Thing).invoke("你好")
    assert isinstance(made, Thing)
    with pytest.raises(openai.BadRequestError, match="tool_choice: forces"):
        model.with_structured_output(Thing, method="function_calling").invoke("你好")


def test_litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices as it is imported
    import litellm

    body = {
        "model": "openai/ads",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "temperature": 0,
        "num_retries": 0,
    }
    whole = litellm.completion(messages=SAY, max_tokens=8, **body)
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 8
    chunks = litellm.completion(messages=SAY, max_tokens=8, stream=True, **body)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    made = litellm.completion(messages=SAY, max_tokens=100, response_format=form, **body)
    assert set(json.loads(made.choices[0].message.content)) == {"name", "count"}
