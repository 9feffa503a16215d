"""The page's client and its answers on their way, against an API that misbehaves."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.serving.page_fake_api import FakeApi
from tests.serving.page_modules import client, job, sessions, texts

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as fake:
        yield fake


def collect(url: str, key: str = "", sampling=None) -> list:
    async def all_pieces() -> list:
        stream = client.stream_chat(client.Api(url, key), "adgen", QUESTION, sampling or client.Sampling())
        return [piece async for piece in stream]

    return asyncio.run(all_pieces())


def names(api) -> list[str]:
    return [model.name for model in client.list_models(api)]


def problem(url: str, key: str = "") -> client.ApiProblem:
    with pytest.raises(client.ApiProblem) as caught:
        collect(url, key)
    for language in texts.LANGUAGES:  # each can be said
        assert texts.problem_text(language, caught.value.kind, caught.value.fields)
    return caught.value


@pytest.fixture
def raw() -> Iterator:
    """Serves the bytes it is given, once, and closes; returns the address."""
    servers = []

    def serve(payload: bytes, kind: str = "text/event-stream") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def event(content: str, **more) -> bytes:
    body = {"choices": [{"delta": {"content": content}, "finish_reason": None} | more]}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode()


END = b'\n\ndata: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


def test_pieces_and_the_request(api):
    api.answers["adgen"] = ["你", "好"]
    api.headers = {"X-History-Dropped": "2"}
    pieces = collect(api.url)
    assert "".join(piece.text for piece in pieces) == "你好"
    assert pieces[0].dropped == 2
    assert pieces[-1].finish == "stop"
    sent = {"temperature": 0.8, "top_p": 0.8, "max_tokens": 512}
    assert api.requests == [{"model": "adgen", "messages": QUESTION, "stream": True, **sent}]


def test_only_what_is_set_is_sent(api):
    collect(api.url, sampling=client.Sampling(0.0, 1.0, 5, 7, 0.5, -0.5))
    body = {name: value for name, value in api.requests[0].items() if name not in ("model", "messages", "stream")}
    assert body == {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 5,
        "seed": 7,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
    }


def test_line_ends_comments_and_separators_inside_the_text(raw):
    payload = b": hello\r\n\r\n" + event("一\u2028二\x85三") + b"\r\n\r\n" + event("\u000b四") + END
    assert "".join(piece.text for piece in collect(raw(payload))) == "一\u2028二\x85三\u000b四"


def test_half_a_character_is_replaced(raw):
    payload = b'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}' + END
    assert collect(raw(payload))[0].text == "a?"


def test_a_usage_chunk_is_no_text(raw):
    payload = event("a") + b'\n\ndata: {"choices": [], "usage": {}}' + END
    assert [piece.text for piece in collect(raw(payload))] == ["a", ""]


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"", "cut"),
        (event("a") + b"\n\n", "cut"),
        (b'data: {"error": {"message": "the worker died", "code": "unavailable"}}\n\n', "server"),
        (b"data: not json\n\n", "not_the_api"),
        (b"data: [1]\n\n", "not_the_api"),
    ],
)
def test_a_stream_that_goes_wrong(raw, payload, kind):
    found = problem(raw(payload))
    assert found.kind == kind
    if kind == "server":
        assert "the worker died" in found.fields["detail"]


def test_another_server_is_recognized(raw, api):
    assert problem(raw(b"<html>", "text/html")).kind == "not_the_api"
    api.refusal = (404, "<html>no such page</html>", {})
    assert problem(api.url).kind == "not_the_api"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "refused"),
        (404, "unknown"),
        (413, "refused"),
        (422, "refused"),
        (500, "server"),
        (503, "down"),
        (504, "too_long"),
    ],
)
def test_statuses(api, status, kind):
    api.refusal = (status, {"error": {"message": "because"}}, {})
    found = problem(api.url)
    assert (found.kind, found.fields["detail"]) == (kind, "because")


def test_busy_says_when_to_come_again(api):
    api.refusal = (429, {"error": {"message": "full"}}, {"Retry-After": "7"})
    assert "7" in texts.problem_text("en", problem(api.url).kind, problem(api.url).fields)
    api.refusal = (429, {"error": {"message": "full"}}, {})
    assert problem(api.url).kind == "busy_soon"


def test_keys(api):
    api.key = "secret"
    assert problem(api.url).kind == "key_missing"
    assert problem(api.url, "wrong").kind == "key_wrong"
    assert collect(api.url, "secret")
    assert names(client.Api(api.url, "secret")) == api.models
    with pytest.raises(client.ApiProblem, match="key_missing"):
        client.list_models(client.Api(api.url))


def test_nothing_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert problem(url).kind == "unreachable"
    assert problem("ftp://nowhere").kind == "bad_url"
    assert problem("127.0.0.1:7030").kind == "bad_url"


def test_address_from_the_environment(monkeypatch):
    monkeypatch.delenv("PTUNING_API", raising=False)
    monkeypatch.setenv("PTUNING_API_KEY", " k ")
    assert client.Api.from_environment() == client.Api("http://127.0.0.1:7030", "k")
    monkeypatch.setenv("PTUNING_API", "http://localhost:1/v1/")
    assert client.Api.from_environment().url == "http://localhost:1"


def test_a_proxy_is_not_asked_for_this_machine(api, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert names(client.Api(api.url)) == api.models


def make_job(api: FakeApi, changed: threading.Event) -> job.Job:
    return job.Job(client.Api(api.url), "adgen", QUESTION, client.Sampling(), changed)


def test_a_job_ends_by_itself(api):
    changed = threading.Event()
    made = make_job(api, changed)
    made.join(10)
    assert made.done
    assert changed.is_set()
    assert (made.text, made.finish, made.problem, made.stopped) == ("adgen: 你好", "stop", None, False)
    made.stop()
    assert not made.stopped


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_job_is_stopped_in_the_middle(api, pieces):
    api.answers["adgen"] = ["一", "二"]
    api.hold("adgen")
    changed = threading.Event()
    made = make_job(api, changed)
    api.release("adgen", pieces)
    while made.text != "一"[:pieces]:
        assert changed.wait(10)
        changed.clear()
    made.stop()
    made.join(10)
    assert made.done
    assert made.stopped
    assert made.text == "一"[:pieces]


def test_a_stop_before_the_server_answers():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        made = job.Job(client.Api(url), "adgen", QUESTION, client.Sampling(), threading.Event())
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(10)
            made.stop()
            made.join(10)
            assert made.done
            connection.settimeout(10)
            while connection.recv(4096):  # until the client closes
                pass


def test_many_stops_at_any_time_end_every_job(api):
    """A stop may meet the thread anywhere: before its loop, while it connects, at its end."""
    jobs = [make_job(api, threading.Event()) for _ in range(40)]
    for made in jobs:
        made.stop()
    for made in jobs:
        made.join(10)
        assert made.done
        assert made.problem is None


def test_models_say_when_they_were_saved(api):
    api.saved = {"adgen": 1_700_000_000, "faq": 1_600_000_000}
    found = {model.name: model.saved for model in client.list_models(client.Api(api.url))}
    assert found == {"chatglm2-6b": 0} | api.saved


def test_conversations_are_kept_under_names_that_are_given_out():
    kept = sessions.Sessions(most=2)
    first, second = kept.add("一"), kept.add("二")
    assert len(first) > 20 and kept.find(first) == "一" and kept.find("of my own") is kept.find(None) is None
    kept.add("三")  # the second makes room: it was unused longest
    assert kept.find(first) == "一" and kept.find(second) is None
