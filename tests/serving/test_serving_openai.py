"""OpenAI's official client, unchanged, against the server."""

import asyncio

import openai
import pytest

SAY = [{"role": "user", "content": "你好"}]
CHAT = {"model": "base", "messages": SAY, "temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["chatglm2-tiny", "ads", "proj", "talk"]
    assert client.models.retrieve("ads").id == "ads"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat(client):
    answer = client.chat.completions.create(**CHAT)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == "你好！有什么可以帮你的吗？"
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert answer.object == "chat.completion" and answer.model == "chatglm2-tiny" and answer.created > 1e9
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.prompt_tokens > 10
    short = client.chat.completions.create(**CHAT | {"max_tokens": 2})
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    newer = CHAT | {"max_completion_tokens": 2}
    del newer["max_tokens"]
    assert client.chat.completions.create(**newer).usage.completion_tokens == 2


def test_streamed_chat_is_the_same_text(client):
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[1:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 5
    plain = list(client.chat.completions.create(**CHAT, stream=True))
    assert all(chunk.usage is None for chunk in plain) and plain[-1].choices


def test_stream_on_the_wire(server):
    answer = server.chat(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])


def test_async_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**CHAT), client.chat.completions.create(**CHAT, stream=True)
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return whole.choices[0].message.content, text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_several_answers_with_seeds(client):
    body = CHAT | {"temperature": 2, "top_p": 1, "n": 3, "seed": 7, "max_tokens": 10}
    first = client.chat.completions.create(**body)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    again = client.chat.completions.create(**body)
    assert [choice.message.content for choice in again.choices] == texts
    alone = client.chat.completions.create(**body | {"n": 1, "seed": 8})
    assert alone.choices[0].message.content == texts[1]  # answer i has seed + i
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**body, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_temperature_changes_the_answer(client):
    hot = [
        client.chat.completions.create(**CHAT | {"temperature": 2, "top_p": 1}).choices[0].message.content
        for _ in range(4)
    ]
    assert len(set(hot)) > 1
    assert (
        client.chat.completions.create(**CHAT | {"temperature": 2, "top_p": 0})
        .choices[0]
        .message.content.startswith("你好！有什么可以")
    )


@pytest.mark.parametrize("stop", ["什么", ["不在", "什么可"], ["有"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, stop, stream):
    answer = client.chat.completions.create(**CHAT, stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == ("你好！" if stop == ["有"] else "你好！有") and finish == "stop"


def test_logprobs(client):
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert (
        bytes(byte for token in content for byte in token.bytes).decode().strip() == answer.choices[0].message.content
    )
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
    streamed = []
    for chunk in client.chat.completions.create(**CHAT, logprobs=True, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [token.token for token in streamed] == [token.token for token in content]
    assert all(token.top_logprobs == [] for token in streamed)


def test_logprobs_leave_out_the_stop_string(client):
    answer = client.chat.completions.create(**CHAT, logprobs=True, stop="什么")
    text = "".join(token.token for token in answer.choices[0].logprobs.content)
    assert "么" not in text.replace("有什么", "")


def test_penalties(client):
    body = {"model": "ads", "messages": SAY, "temperature": 0, "max_tokens": 40}
    plain = client.chat.completions.create(**body, logprobs=True).choices[0]
    for name in ("frequency_penalty", "presence_penalty"):
        changed = client.chat.completions.create(**body, **{name: 2}, logprobs=True).choices[0]
        tokens = [token.token for token in changed.logprobs.content]
        before = [token.token for token in plain.logprobs.content]
        assert changed.message.content != plain.message.content
        assert len(set(tokens)) / len(tokens) > len(set(before)) / len(before)


def test_system_and_turns(client):
    messages = [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
        {"role": "assistant", "content": "好的", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "再见"},
    ]
    long = client.chat.completions.create(**CHAT | {"messages": messages})
    short = client.chat.completions.create(**CHAT | {"messages": messages[1:]})
    assert long.usage.prompt_tokens > short.usage.prompt_tokens > 25
    developer = [{"role": "developer", "content": "你是助手"}, *messages[1:]]
    assert client.chat.completions.create(**CHAT | {"messages": developer}).usage == long.usage


def test_what_asks_for_nothing_is_accepted(client):
    client.chat.completions.create(
        **CHAT,
        n=1,
        tools=[],
        logit_bias={},
        user="me",
        store=False,
        metadata={"a": "b"},
        response_format={"type": "text"},
        tool_choice="none",
        parallel_tool_calls=True,
        service_tier="auto",
        frequency_penalty=0,
        presence_penalty=0,
        stop=None,
        seed=None,
        logprobs=False,
        extra_body={"best_of": 1, "echo": False},
    )


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
            "tool_choice: forces",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice: forces"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "can't be followed"),
        ({"logit_bias": {"5": 1}}, "logit_bias: not supported"),
        ({"modalities": ["audio"]}, "modalities: not supported"),
        ({"n": 3, "extra_body": {"best_of": 2}}, "best_of: is 2 and n is 3"),
        ({"stream": True, "extra_body": {"best_of": 2}}, "best_of: only without stream"),
        (
            {"extra_body": {"guided_choice": ["a"]}, "response_format": {"type": "json_object"}},
            "guided_choice: only without",
        ),
        ({"extra_body": {"n": True}}, "n: "),
        ({"extra_body": {"top_k": -2}}, "top_k: "),
        ({"extra_body": {"min_p": 1.5}}, "min_p: "),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty: "),
        ({"extra_body": {"made_up": 5}}, "made_up: not supported"),
        ({"max_tokens": 8.5}, "max_tokens: "),
        ({"temperature": 2.5}, r"temperature: .* 2 \(got 2.5\)"),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 1.5}, "top_p: "),
        ({"n": 0}, "n: "),
        ({"n": 33}, "n: .*32"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"stop": ""}, "stop: "),
        ({"stop": ["a", ""]}, r"stop\[1\]: "),
        ({"seed": 1.5}, "seed: "),
        ({"top_logprobs": 3}, "top_logprobs: only with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: .*20"),
        ({"stream_options": {"include_usage": True}}, "only with stream=true"),
        ({"frequency_penalty": 3}, "frequency_penalty: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role: "),
        ({"messages": [*SAY, {"role": "assistant", "content": "x"}]}, r"messages\[1\]: role is 'assistant'; the last"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "长" * 9000}]}, "the model's context is 2048"),
    ],
)
def test_what_is_not_supported_is_a_400(client, more, text):
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        client.chat.completions.create(**CHAT | more)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.type == "invalid_request_error" and caught.value.param


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="there are chatglm2-tiny, ads, proj, talk") as caught:
        client.chat.completions.create(**CHAT | {"model": "nobody"})
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_unknown_route(server):
    answer = server.get("/v1/audio")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_such_route"


def test_history_dropped_is_in_the_header_also_of_a_stream(server):
    old = [{"role": "user", "content": "白色的衣身" * 50}, {"role": "assistant", "content": "十分百搭" * 50}] * 20
    for stream in (False, True):
        answer = server.post(
            "/v1/chat/completions", {**CHAT, "messages": [*old, *SAY], "stream": stream, "max_tokens": 4}
        )
        assert answer.status_code == 200 and 0 < int(answer.headers["x-history-dropped"]) <= 20


# --- /v1/completions ----------------------------------------------------------------------------------------------------

RAW = {"model": "base", "prompt": "[Round 1]\n\n问：你好\n\n答：", "temperature": 0}


def test_completion_is_the_bare_text(client):
    answer = client.completions.create(**RAW, max_tokens=12)
    assert answer.choices[0].text == "你好！有什么可以帮你的吗？"
    assert answer.object == "text_completion" and answer.choices[0].finish_reason == "stop"
    assert client.completions.create(**RAW).usage.completion_tokens <= 16


def test_streamed_completion(client):
    chunks = list(client.completions.create(**RAW, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "你好！有什么可以帮你的吗？"
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 0


def test_several_prompts(client):
    prompts = [RAW["prompt"], RAW["prompt"].replace("你好", "再见")]
    answer = client.completions.create(**RAW | {"prompt": prompts, "n": 2}, max_tokens=6)
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[0] != texts[2]
    single = client.completions.create(**RAW | {"prompt": prompts[1]}, max_tokens=6)
    assert single.choices[0].text == texts[2]


def test_completion_logprobs(client):
    answer = client.completions.create(**RAW, max_tokens=12, logprobs=2).choices[0]
    found = answer.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert "".join(found.tokens).removeprefix(" ") == answer.text
    assert all(len(top) == 2 for top in found.top_logprobs)
    for token, start in list(zip(found.tokens, found.text_offset, strict=True))[1:]:
        assert answer.text.startswith(token, start)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"prompt": [1, 2]}, "token ids"),
        ({"prompt": [[1, 2]]}, "token ids"),
        ({"prompt": []}, "prompt"),
        ({"echo": True}, "echo: not supported"),
        ({"best_of": 33}, "best_of: .*32"),
        ({"suffix": "x"}, "suffix: not supported"),
        ({"logprobs": 6}, "logprobs: .*5"),
    ],
)
def test_completions_refuse(client, more, text):
    with pytest.raises(openai.BadRequestError, match=text):
        client.completions.create(**RAW | more)
