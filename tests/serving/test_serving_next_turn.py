"""A model that goes on with the user's next turn: the answer shown ends before it, on every way a dialogue is answered.

The engine is the real one; what it says is dictated, because the small model ends its answers.
"""

import asyncio
from collections import Counter
from dataclasses import replace

import openai
import pytest

from ptuning.families import Dialogue
from ptuning.families.chatglm2.template import ChatGLM2Template, build_prompt
from ptuning.generation import Token
from ptuning.serving.chat import Conversation
from ptuning.serving.detokenize import AnswerText
from ptuning.serving.models import LoadedModel
from ptuning.serving.worker import Worker
from tests.serving.conftest import BASE, running, wait_until
from tests.serving.page_modules import client as page_client

ANSWER = "第一句。\n\n第二句，[Round 2] 是什么？"  # blank lines and the marker's words are an answer's own
RUN_ON = ANSWER + "\n\n[Round 2]\n\n问：再见\n\n答：再见。"
QUESTION = [{"role": "user", "content": "你好"}]


def dictate(worker: Worker) -> None:
    """Makes the engine say RUN_ON to every request, whatever the model computes."""
    step, script, said = worker.engine.step, worker.template.encode_text([RUN_ON])[0], Counter()
    worker.engine.stop_ids = frozenset()

    def say() -> list[Token]:
        told = []
        for token in step():
            place = said[token.id]
            said[token.id] += 1
            if place == len(script):
                worker.engine.cancel(token.id)
                told.append(Token(token.id, None, "stop"))
            else:
                told.append(replace(token, token=script[place]))
        return told

    worker.engine.step = say


@pytest.fixture(scope="module")
def server():
    with running({}, dictate) as made:
        yield made


@pytest.fixture
def chat(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(messages=QUESTION, **more):
        return client.chat.completions.create(model="base", messages=messages, **more)

    return ask


@pytest.mark.parametrize("history", [(), (("你好", "你好！"), ("谢谢", "不客气。"))])
def test_the_text_is_what_the_template_writes_between_two_turns(tiny_tokenizer, history):
    (stop,) = ChatGLM2Template(tiny_tokenizer).stop_texts(Dialogue("在吗", history))
    answered = build_prompt("在吗", history) + "我在。"
    assert build_prompt("再见", [*history, ("在吗", "我在。")]) == answered + stop + "再见\n\n答："


def test_rest(server):
    body = server.post("/chatglm", {"prompt": "你好"}).json()
    assert body["response"] == ANSWER and body["history"] == [["你好", ANSWER]]
    wait_until(lambda: not server.worker.stats().running, "the answer's place is free")


def test_chat_completions(chat, server):
    answer = chat(n=2)
    assert [(each.message.content, each.finish_reason) for each in answer.choices] == [(ANSWER, "stop")] * 2
    assert answer.usage.completion_tokens < 2 * len(server.worker.template.encode_text([RUN_ON])[0])


def test_nothing_of_it_is_streamed(chat):
    chunks = list(chat(stream=True, logprobs=True))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == ANSWER and len(parts) > 10
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in tokens).decode().strip() == ANSWER


def test_stops_of_the_client_come_besides(chat):
    assert chat(stop="句").choices[0].message.content == "第一"
    assert chat(stop="再见").choices[0].message.content == ANSWER


def test_another_round_is_an_answers_own_text(chat):
    later = [*QUESTION, {"role": "assistant", "content": "你好！"}, *QUESTION]
    assert chat(later).choices[0].message.content == RUN_ON


def test_dropped_turns_do_not_count(chat):
    old = [{"role": "user", "content": "白色的衣身" * 500}, {"role": "assistant", "content": "十分百搭" * 500}]
    assert chat([*old, *QUESTION], max_tokens=200).choices[0].message.content == ANSWER


def test_the_page(server):
    async def collect():
        stream = page_client.stream_chat(page_client.Api(server.url, ""), "base", QUESTION, page_client.Sampling())
        return [piece async for piece in stream]

    pieces = asyncio.run(collect())
    assert "".join(piece.text for piece in pieces) == ANSWER and pieces[-1].finish == "stop"


def test_a_bare_completion_has_no_next_turn(server):
    answer = server.post("/v1/completions", {"model": "base", "prompt": build_prompt("你好"), "max_tokens": 200}).json()
    assert answer["choices"][0]["text"].strip() == RUN_ON


class Dictated:
    """An engine that says RUN_ON."""

    def __init__(self, template):
        self.script, self.cancelled, self.told = template.encode_text([RUN_ON])[0], [], 0

    def submit(self, requests):
        for token in self.script:
            self.told += 1
            yield Token(0, token)
        yield Token(0, None, "stop")

    def cancel(self, id):
        self.cancelled.append(id)


def test_chat_in_the_terminal(capsys):
    loaded = LoadedModel.load(BASE, "float32")
    engine = Dictated(loaded.template)
    conversation = Conversation(loaded, engine, None, 100)
    conversation.answer("你好")
    assert conversation.history == [("你好", ANSWER)]
    assert capsys.readouterr().out == f"答：{ANSWER}\n"
    assert engine.told < len(engine.script) and engine.cancelled == [0]


def test_what_could_have_become_it_comes_out_at_the_end(tiny_tokenizer):
    template = ChatGLM2Template(tiny_tokenizer)
    text = AnswerText(template, template.stop_texts(Dialogue("你好")))
    parts = [text.push(Token(0, token)) for token in template.encode_text(["好\n\n[Round 2]"])[0]]
    parts.append(text.push(Token(0, None, "stop")))
    assert "".join(part.text for part in parts) == "好\n\n[Round 2]"
