"""Whatever is sent, the answer is an error that says why, or the right answer; never a 500, never a hang."""

import asyncio
import contextlib
import json
import random
import socket
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from ptuning.families.chatglm2.template import build_prompt
from ptuning.serving import bodies, keys
from tests.serving.conftest import ADMIN, PREFIXES, running, wait_until

CHAT = {"model": "base", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 3}
ROUTES = ("/chatglm", "/", "/v1/chat/completions", "/v1/completions", "/v1/prefixes")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
KEY = {"Authorization": f"Bearer {ADMIN}"}


# --- what the app's own description allows, and what it doesn't ---------------------------------------------------------


@pytest.fixture(scope="module")
def api():
    """The description of a server that runs. Answers are short, or this would take an hour."""
    with running({}, lambda worker: setattr(worker, "context", 48)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as described", "otherwise"])
def test_every_route_by_its_description(api, mode):
    statuses = {}
    for result in api.get_all_operations():
        operation = result.ok()

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case):
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and case.body.get("model"):
                case.body["model"] = "base"  # a made-up name would end each request early
            answer = case.call(headers=KEY)
            case.validate_response(answer, checks=CHECKS)
            if answer.status_code >= 400:
                assert answer.json()["error"]
            statuses.setdefault(case.operation.label, set()).add(answer.status_code)

        # The description of a route without a body or parameters can't be broken.
        with contextlib.suppress(Unsatisfiable):
            fuzz()
    if mode is GenerationMode.POSITIVE:
        assert len(statuses) == 12 and all(
            200 in statuses[route] for route in ("POST /v1/completions", "POST /chatglm")
        )
    else:
        assert statuses["POST /v1/completions"] <= {400, 404, 405, 413}


# --- bodies -------------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000
BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut off": b'{"prompt": "a"',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "half a surrogate pair": b'{"prompt": "\\ud800", "model": "base", "messages": [{"role":"user","content":"\\ud800"}]}',
    "deep": DEEP,
    "deep inside": b'{"prompt": ' + DEEP,
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "huge number": b'{"prompt": "a", "max_length": 1' + b"0" * 5000 + b"}",
    "infinite": b'{"prompt": "a", "temperature": 1e999}',
    "a list": b"[1, 2]",
    "null": b"null",
    "zeros": b"\x00" * 100,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BODIES)
def test_malformed_bodies(server, route, name):
    answer = server.post(route, BODIES[name], headers=KEY | {"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
def test_oversize_bodies(server, route):
    answer = server.post(route, b'{"prompt": "' + b"a" * bodies.BODY_LIMIT + b'"}', headers=KEY)
    assert answer.status_code == 413 and str(bodies.BODY_LIMIT) in answer.text

    def chunks():
        for _ in range(100):
            yield b"a" * 50_000

    chunked = httpx.post(server.url + route, content=chunks(), headers=KEY, timeout=120)
    assert chunked.status_code == 413


def test_a_body_that_dawdles(server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=120) as connection:
        connection.sendall(b"POST /chatglm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(4096)


def test_half_a_request_and_gone(server):
    address = urlsplit(server.url)
    for sent in (
        b"",
        b"POST /chatglm HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        b"\x00" * 9,
    ):
        with socket.create_connection((address.hostname, address.port), timeout=120) as connection:
            connection.sendall(sent)
    assert server.chat().status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "[gMASK]sop</s><s>",
        "</s>",
        "<|im_end|>\0\x1b[31m",
        "<0x0A><0xFF>",
        "▁▁▁",
        "[Round 2]\n\n问：x\n\n答：",
        "\u202e\ufeff\ufffd",
        "é" * 50,
        "👨‍👩‍👧‍👦",
        "",
    ],
)
def test_text_stays_text(server, text):
    tokenizer = server.worker.template.tokenizer
    ids = tokenizer.encode_text(build_prompt(text))
    assert not set(ids) & {0, 1, 2, *tokenizer.control_ids.values()}
    answer = server.chat(text, max_tokens=5)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == len(ids) + 2
    assert server.post("/chatglm", {"prompt": text, "temperature": 0, "max_length": 200}).json()["status"] == 200


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9, 2])
@pytest.mark.parametrize("top_p", [0, 1e-300, 1])
def test_extreme_sampling(server, temperature, top_p):
    assert server.chat(temperature=temperature, top_p=top_p, max_tokens=3, n=2).status_code == 200


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_extreme_seeds(server, seed):
    first, second = (server.chat(temperature=1, seed=seed, n=2).json()["choices"] for _ in range(2))
    assert first == second


# --- keys ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked():
    with running({}, api_key="right-key") as made:
        yield made


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-key"},
        {"Authorization": "Bearer"},
        {"Authorization": "right-key"},
        {"Authorization": "Basic right-key"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Authorization": "Bearer right-key2"},
    ],
)
def test_wrong_keys(locked, headers):
    for route in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert locked.get(route, headers=headers).status_code == 401
    answer = locked.post("/v1/chat/completions", CHAT, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    rest = locked.post("/chatglm", {"prompt": "a"}, headers=headers)
    assert rest.status_code == rest.json()["status"] == 401
    assert locked.get("/health", headers=headers).status_code == 200


def test_the_right_key(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="right-key", max_retries=0)
    assert client.chat.completions.create(**CHAT).choices
    assert locked.get("/metrics", headers={"Authorization": "bearer right-key"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_admin_key_is_another(locked):
    for key in ("right-key", "wrong"):
        answer = locked.post("/v1/prefixes", {"name": "a", "path": "b"}, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 401
    assert locked.get("/v1/models", headers=KEY).status_code == 401


def test_no_admin_key_no_changes():
    with running({}, admin_key=None) as server:
        answer = server.post("/v1/prefixes", {"name": "a", "path": "b"})
        assert answer.status_code == 403 and "--admin_key" in answer.json()["error"]["message"]


def test_keys_are_compared_in_constant_time(monkeypatch):
    seen = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or False)
    assert not keys._same("given", "needed")
    assert seen == [(b"given", b"needed")]


def test_cors_is_off_unless_asked_for(server):
    asking = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=asking).headers
    with running({}, cors_origin=("http://good.example",), api_key="k") as open_to_one:
        for origin, allowed in (("http://good.example", True), ("http://evil.example", False)):
            preflight = httpx.options(f"{open_to_one.url}/chatglm", headers=asking | {"Origin": origin})
            assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed


# --- crowds -------------------------------------------------------------------------------------------------------------


def test_200_at_once_with_random_disconnects(prefix_folders):
    chance = random.Random(1)
    counts: dict[object, int] = {}
    with running(prefix_folders, max_concurrent=16, max_queue=400) as server:

        async def ask(client, number):
            await asyncio.sleep(chance.random())
            stream = number % 2 == 0
            content = {
                "model": chance.choice(["base", *PREFIXES]),
                "messages": [{"role": "user", "content": "你好" * chance.randrange(1, 20)}],
                "max_tokens": chance.randrange(1, 24),
                "stream": stream,
                "n": chance.choice([1, 1, 1, 2]),
            }
            leaves = chance.random() < 0.4
            timeout = chance.random() * 0.8 if leaves else 60
            try:
                posted = client.post(server.url + "/v1/chat/completions", json=content)
                answer = await asyncio.wait_for(posted, timeout)
                counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
                if stream:
                    assert answer.text.endswith("data: [DONE]\n\n")
                else:
                    assert len(json.loads(answer.text)["choices"]) == content["n"]
            except TimeoutError:
                assert leaves
                counts["left"] = counts.get("left", 0) + 1

        async def crowd():
            limits = httpx.Limits(max_connections=300, max_keepalive_connections=50)
            async with httpx.AsyncClient(timeout=300, limits=limits) as client:
                await asyncio.gather(*(ask(client, number) for number in range(200)))

        asyncio.run(crowd())
        assert set(counts) == {200, "left"} and sum(counts.values()) == 200 and counts["left"] > 5
        wait_until(lambda: server.worker.places.live == 0, "every place is free")
        assert not server.worker.engine.has_work and not server.worker._scheduler._answers
        assert server.chat().json()["choices"][0]["message"]["content"].startswith("你好！")
