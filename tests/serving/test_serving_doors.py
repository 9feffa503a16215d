"""Who may knock: names of the server, web pages, several keys; and connections that bring nothing."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from ptuning.errors import ConfigError
from ptuning.serving import connections
from ptuning.serving.connections import HttpConfig, raise_file_limit
from ptuning.serving.doors import HostNames
from ptuning.serving.logs import Brake, JsonLines
from ptuning.serving.options import parse
from ptuning.serving.worker import without_listing
from tests.serving.conftest import ADMIN, running, wait_until
from tests.serving.test_serving_engine import Ask, body

# What the openai JavaScript SDK sends with every request, and a browser therefore asks about.
SDK_HEADERS = ", ".join(
    f"x-stainless-{name}"
    for name in ("arch", "lang", "os", "package-version", "retry-count", "runtime", "runtime-version", "timeout")
)


def port_of(server) -> int:
    return urlsplit(server.url).port


def chat(server, headers, **more) -> httpx.Response:
    return server.post("/v1/chat/completions", body("你好", max_tokens=2) | more, headers=headers)


def speak(server, data: bytes, half_close: bool = False) -> bytes:
    """What comes back on a connection of its own, until the server closes it."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=120) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# --- hosts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example.com", "evil.example.com:7030", "127.0.0.1.evil.example.com", "10.0.0.1", "a@127.0.0.1"]
)
def test_a_host_that_is_not_ours_is_refused_everywhere(server, host):
    for path in ("/v1/models", "/health", "/metrics", "/openapi.json", "/nowhere"):
        answer = server.get(path, headers={"Host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
    answer = server.post("/chatglm", {"prompt": "你好"}, headers={"Host": host})
    assert answer.status_code == 403 and "--allowed_host" in answer.json()["error"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:7030", "127.0.0.1", "127.0.0.2:1", "[::1]", "[::1]:7030", "localhost."]
)
def test_loopback_names_are_ours(server, host):
    assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_long_host_is_not_echoed_and_several_are_refused(server):
    answer = server.get("/v1/models", headers={"Host": "x" * 20_000})
    assert answer.status_code == 403 and len(answer.content) < 500
    answer = speak(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"several Host headers" in answer
    assert speak(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")  # there is no browser without


def test_allowed_hosts():
    names = HostNames("192.168.1.5", ("api.example.com", "*.cluster.local"))
    for host in ("192.168.1.5:7030", "API.example.com", "a.b.cluster.local", "localhost"):
        assert names.include(host), host
    for host in ("192.168.1.6", "example.com", "cluster.local.evil", "evilcluster.local", "x.api.example.com"):
        assert not names.include(host), host
    everywhere = HostNames("0.0.0.0", ())  # an address can't be made to point elsewhere
    assert everywhere.include("10.1.2.3:80") and everywhere.include(socket.gethostname())
    assert not everywhere.include("evil.example")
    assert HostNames("127.0.0.1", ("*",)).include("whatever.example")


# --- web pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_others_cannot_occupy_the_model(server, headers):
    form = headers | {"content-type": "text/plain"}  # what a form sends without asking first
    answer = server.post("/chatglm", b'{"prompt": "a", "x": "="}', headers=form)
    assert answer.status_code == 403 and "--cors_origin" in answer.json()["error"]
    assert server.get("/v1/models", headers=headers).status_code == 403


def test_pages_of_our_own_and_programs_may(server):
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.get("/v1/models", headers=own).status_code == 200
    assert server.get("/v1/models", headers={"Sec-Fetch-Site": "none"}).status_code == 200


def test_the_openai_javascript_sdk_in_an_allowed_page(prefix_folders):
    with running({}, cors_origin=("http://good.example",), api_key="k") as server:
        for method, path in (("POST", "/v1/chat/completions"), ("DELETE", "/v1/prefixes/a"), ("GET", "/v1/models")):
            asking = {
                "Origin": "http://good.example",
                "Sec-Fetch-Site": "cross-site",
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": f"authorization, content-type, {SDK_HEADERS}",
            }
            preflight = httpx.options(server.url + path, headers=asking)
            assert preflight.status_code == 200, preflight.text
            assert preflight.headers["access-control-allow-origin"] == "http://good.example"
            assert method in preflight.headers["access-control-allow-methods"]
            allowed = {name.strip() for name in preflight.headers["access-control-allow-headers"].lower().split(",")}
            assert {name.strip() for name in SDK_HEADERS.split(",")} <= allowed
            assert "access-control-allow-private-network" not in preflight.headers
            private = asking | {"Access-Control-Request-Private-Network": "true"}  # asked by a page of the internet
            preflight = httpx.options(server.url + path, headers=private)
            assert preflight.status_code == 200 and preflight.headers["access-control-allow-private-network"] == "true"
            preflight = httpx.options(server.url + path, headers=private | {"Origin": "http://evil.example"})
            assert preflight.status_code == 403 and "access-control-allow-private-network" not in preflight.headers
        asking = {"Origin": "http://good.example", "Authorization": "Bearer k", "Sec-Fetch-Site": "cross-site"}
        answer = server.get("/v1/models", headers=asking)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://good.example"
        assert server.get("/v1/models", headers=asking | {"Origin": "http://evil.example"}).status_code == 403


# --- keys ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# who may ask\nweb  key-of-web 2\n\nbatch key-of-batch\n")
    return file


def test_keys_with_names_and_limits(keys, gated):
    web, batch = ({"Authorization": f"Bearer key-of-{name}"} for name in ("web", "batch"))
    with gated(api_keys=str(keys)) as (server, gate), ExitStack() as stack:
        first = Ask(stack, server, body("你好", max_tokens=2, n=2), headers=web)
        wait_until(lambda: server.worker.places.live == 2, "both run")
        refused = chat(server, web)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert "2 answers of key 'web' run or wait and 1 more are asked for, its limit is 2" in refused.text
        never = chat(server, web, n=3)
        assert never.status_code == 400 and "key 'web' may have 2" in never.text
        other = Ask(stack, server, body("你好", max_tokens=2, n=5), headers=batch)
        gate.open()
        assert first.result().status_code == other.result().status_code == 200
        for stream in (False, True):  # places come back, also those of streams
            assert chat(server, web, n=2, stream=stream).status_code == 200
        assert chat(server, {"Authorization": "Bearer nobody"}).status_code == 401


def test_places_of_a_client_that_goes_away_come_back(keys, gated):
    web = {"Authorization": "Bearer key-of-web"}
    with gated(api_keys=str(keys)) as (server, gate):
        for stream in (False, True):
            with httpx.Client(timeout=0.3, headers=web) as client, contextlib.suppress(httpx.ReadTimeout):
                request = client.build_request(
                    "POST", server.url + "/v1/chat/completions", json=body("a", n=2, stream=stream)
                )
                client.send(request, stream=True).close()
            wait_until(lambda: gate.let(1) or server.worker.places.live == 0, "the client is noticed")
        gate.open()
        wait_until(lambda: chat(server, web, n=2).status_code == 200, "the places are free")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has no key"),
        ("web", "line 1: has 1 words"),
        ("web k 0", "line 1: answers is '0'"),
        ("a k\nb k", "line 2: the key of 'b' is also that of 'a'"),
        ("a k\na l", "line 2: the name of 'a'"),
        ("a ké", "line 1: the key isn't ASCII"),
    ],
)
def test_key_files_that_cannot_be_used(tmp_path, text, error):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=error):
        parse(["--api_keys", str(tmp_path / "keys")])


def test_a_key_file_is_a_key(keys, tmp_path):
    assert [key.name for key in parse(["--host", "0.0.0.0", "--api_keys", str(keys), "--api_key", "x"]).keys] == [
        "api_key",
        "web",
        "batch",
    ]
    with pytest.raises(ConfigError, match="--api_key is also that of 'web'"):
        parse(["--api_keys", str(keys), "--api_key", "key-of-web"])
    with pytest.raises(ConfigError, match="can't be read"):
        parse(["--api_keys", str(tmp_path / "none")])


# --- connections --------------------------------------------------------------------------------------------------------


def test_idle_connections_make_room(prefix_folders):
    with running({}, max_connections=20) as server, ExitStack() as stack:
        for number in range(60):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), timeout=120))
            if number % 2:
                idle.sendall(
                    b"POST /chatglm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
                    if number % 4 == 1
                    else b"GET / HT"
                )
            if number % 20 == 19:
                assert server.get("/health").status_code == 200
        assert server.chat(max_tokens=2).status_code == 200


def test_answers_under_way_are_never_what_makes_room(gated):
    with gated(max_connections=8) as (server, gate), ExitStack() as stack:
        asked = [Ask(stack, server, body("你好", max_tokens=2)) for _ in range(8)]
        wait_until(lambda: server.worker.places.live == 8, "eight are being answered")
        refused = httpx.get(server.url + "/health")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.headers["content-type"] == "application/json"
        assert "all 8 are being answered (--max_connections)" in refused.json()["error"]["message"]
        gate.open()
        assert [ask.result().status_code for ask in asked] == [200] * 8


def test_a_head_that_dawdles_is_closed(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    for begun in (b"", b"GET /health HT", b"\r\n"):
        assert speak(server, begun) == b""


def test_an_answer_that_nobody_reads_is_dropped(monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.2)
    ended = threading.Event()

    async def endless(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200})
        while (await asyncio.wait({asyncio.ensure_future(receive())}, timeout=0))[1]:
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        ended.set()

    server = uvicorn.Server(HttpConfig(endless, 8, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server listens")
    with socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=120) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(60), "the answer goes on although nobody reads it"
    server.should_exit = True
    thread.join(60)


def test_a_half_closed_request_is_answered(server):
    sent = json.dumps(body("你好", max_tokens=8)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(sent)
    answer = speak(server, head + sent, half_close=True)
    while answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
        answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK") and "你好！".encode() in answer


def test_two_lengths_close_the_connection(server):
    smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for names in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    ):
        answer = speak(server, b"POST /chatglm HTTP/1.1\r\nHost: localhost\r\n" + names + b"\r\n\r\n" + smuggled)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"\r\nconnection: close\r\n" in answer
        head, _, sent = answer.partition(b"\r\n\r\n")
        assert json.loads(sent)["error"]["code"] == "invalid_http" and b"can't be present with" in sent
        assert b"content-length: %d" % len(sent) in head  # and nothing after it


def test_a_head_that_is_too_large(server):
    """Both at once and bit by bit: one header that never ends is nothing that the parser tells of."""
    line = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    many = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 990) for number in range(70))
    for sent in (line + many + b"\r\n", line + b"X-Long: " + b"a" * (connections.HEAD_LIMIT + 1)):
        answer = speak(server, sent)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        said = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert said["code"] == "head_too_large" and "more than 65536 bytes; send fewer" in said["message"]
    two = b"POST /chatglm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600000\r\n\r\n" + b" " * 600_000 + line
    answer = speak(server, two + b"Connection: close\r\n\r\n")  # a long body before it isn't part of a head
    assert answer.startswith(b"HTTP/1.1 400 ") and b"HTTP/1.1 200 " in answer


def test_the_soft_limit_of_files_is_raised():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        assert raise_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, connections.MOST_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- what is said, and what isn't ---------------------------------------------------------------------------------------


def test_a_404_is_short(server):
    answer = server.get("/" + "a" * 60_000)
    assert answer.status_code == 404 and len(answer.content) < 400 and "aaa" in answer.text


def test_the_admin_route_does_not_list_folders(server, tmp_path):
    (tmp_path / "secret (found) plans.txt").write_text("x")
    key = {"Authorization": f"Bearer {ADMIN}"}
    answer = server.post("/v1/prefixes", {"name": "x", "path": str(tmp_path)}, headers=key)
    assert answer.status_code == 400 and str(tmp_path) in answer.text and "secret" not in answer.text
    assert without_listing("a: has no weights (found b, c (d)). Expected e.") == "a: has no weights. Expected e."


def test_the_request_id_of_a_client_is_taken_over(server):
    assert server.get("/health", headers={"X-Request-ID": "trace-1:a/b"}).headers["x-request-id"] == "trace-1:a/b"
    for bad in ("x" * 200, "a b", b"\xff"):
        made = server.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert len(made) == 16


def test_a_stream_that_is_cut_is_no_200(gated):
    with gated(request_timeout=30) as (server, gate):
        request = httpx.Client(timeout=120).build_request(
            "POST", server.url + "/v1/chat/completions", json=body("你好", stream=True)
        )
        with httpx.Client(timeout=120) as client:
            answer = client.send(request, stream=True)
            next(answer.iter_bytes())
            answer.close()
        gate.open()
        line = 'ptuning_requests_total{model="chatglm2-tiny",route="/v1/chat/completions",status="499"} 1.0'
        wait_until(lambda: line in server.get("/metrics").text, "it is counted as cut")


def figure(server, name: str) -> float:
    return float(server.get("/metrics").text.split(f"\nptuning_{name} ")[1].split()[0])


def test_further_figures(gated):
    queued = 'queue_seconds_count{model="chatglm2-tiny"}'
    with gated() as (server, gate), ExitStack() as stack:
        asked = [Ask(stack, server, body("你好", max_tokens=12)) for _ in range(2)]
        wait_until(lambda: server.worker.stats().waiting == 2, "both wait")
        assert figure(server, "cache_use") == figure(server, "cached_tokens") == 0
        gate.let(1)
        wait_until(lambda: "_queue_seconds_count{" in server.get("/metrics").text, "one has begun")
        assert 0 < figure(server, "cache_use") < 0.01
        gate.open()
        assert [ask.result().status_code for ask in asked] == [200, 200]
        assert figure(server, queued) == 2
        wait_until(lambda: figure(server, "cached_tokens") > 0, "turns are kept")


def test_a_flood_of_one_line_is_braked():
    now = [0.0]
    brake = Brake(lambda: now[0])

    def lines(count, text="accept failed"):
        records = [logging.LogRecord("asyncio", logging.ERROR, "", 0, text, (), None) for _ in range(count)]
        return [record for record in records if brake.filter(record)]

    assert len(lines(10_000)) == 20 and len(lines(3, "another")) == 3
    now[0] = 61.0
    (first,) = lines(1)
    assert json.loads(JsonLines().format(first))["left_out"] == 9_980


def test_slow_clients_do_not_keep_others_waiting(server):
    """Threads that drip bytes, for as long as somebody else is answered."""
    stop = threading.Event()

    def drip():
        with socket.create_connection(("127.0.0.1", port_of(server)), timeout=120) as connection:
            for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 1000:
                if stop.wait(0.01):
                    return
                connection.sendall(bytes([byte]))

    threads = [threading.Thread(target=drip, daemon=True) for _ in range(10)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert server.chat(max_tokens=4).status_code == 200
    assert time.monotonic() - began < 60
    stop.set()
    for thread in threads:
        thread.join(60)
