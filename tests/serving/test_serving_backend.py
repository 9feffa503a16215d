"""The HTTP side over another backend than the worker: the protocol is all that it needs."""

import pytest
from fastapi.testclient import TestClient

from ptuning.families.chatglm2.template import ChatGLM2Template
from ptuning.generation import Token
from ptuning.serving.access import Metrics
from ptuning.serving.app import create_app
from ptuning.serving.backend import BASE, Answers, Backend, Served, Stats, UnknownModel
from ptuning.serving.options import ServeOptions


class Canned:
    """The answers of a backend that holds no model: each is the same text."""

    def __init__(self, count: int, ids: list[int]):
        self.left = [(i, Token(i, token)) for token in ids for i in range(count)]
        self.left += [(i, Token(i, None, "stop")) for i in range(count)]

    def __aiter__(self) -> "Canned":
        return self

    async def __anext__(self) -> tuple[int, Token]:
        if not self.left:
            raise StopAsyncIteration
        return self.left.pop(0)

    def cancel(self, index: int | None = None) -> None:
        self.left = [item for item in self.left if index is not None and item[0] != index]


class Echo:
    """A Backend without an engine, without torch."""

    context, capacity = 256, 8

    def __init__(self, template: ChatGLM2Template):
        self.template, self.asked = template, []

    def start(self) -> None: ...

    def served(self) -> list[Served]:
        return [Served("echo", 0)]

    def find(self, name: str) -> Served:
        if name not in (BASE, "echo"):
            raise UnknownModel(f"there is no model {name!r}")
        return self.served()[0]

    def submit(self, model, requests) -> Answers:
        self.asked += requests
        return Canned(len(requests), self.template.encode_text([f"{model} 好"])[0])

    async def add_prefix(self, name: str, folder: str) -> Served:
        return Served(name, 0, pre_seq_len=1, kind="prefix")

    async def remove_prefix(self, name: str) -> None: ...

    def stats(self) -> Stats:
        return Stats(0, 0, True, False)

    def drain(self) -> None: ...

    def wait_idle(self, seconds: float) -> bool:
        return True

    def close(self) -> None: ...


@pytest.fixture
def echo(tiny_tokenizer) -> tuple[TestClient, Echo]:
    backend: Backend = Echo(ChatGLM2Template(tiny_tokenizer))
    return TestClient(create_app(backend, ServeOptions(allowed_host=("testserver",)), Metrics())), backend


def test_every_route_answers(echo):
    client, backend = echo
    body = {"model": "echo", "messages": [{"role": "user", "content": "你好"}], "n": 2, "seed": 7, "temperature": 1}
    choices = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["echo 好"] * 2
    assert [request.sampling.seed for request in backend.asked] == [7, 8]
    assert client.post("/v1/completions", json={"model": "base", "prompt": "1"}).json()["choices"][0]["text"]
    assert client.post("/chatglm", json={"prompt": "你好"}).json()["response"] == "echo 好"
    assert "data: [DONE]" in client.post("/v1/chat/completions", json=body | {"stream": True}).text
    assert client.post("/v1/chat/completions", json=body | {"model": "x"}).status_code == 404
    assert client.get("/health").json()["status"] == "ok"
