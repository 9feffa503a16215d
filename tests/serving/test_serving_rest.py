"""The REST contract that deployed clients rely on."""

import datetime
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import REPO

GREEDY = {"temperature": 0, "max_length": 60}


@pytest.mark.parametrize("path", ["/", "/chatglm"])
def test_the_contract(server, path):
    answer = server.post(path, {"prompt": "你好", "history": [["1", "2"]], **GREEDY})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"response", "history", "status", "time"}
    assert body["status"] == 200 and body["response"]
    assert body["history"] == [["1", "2"], ["你好", body["response"]]]
    datetime.datetime.strptime(body["time"], "%Y-%m-%d %H:%M:%S")


@pytest.mark.parametrize("empty", ["", None, " "])
def test_empty_means_default(server, empty):
    body = {
        "prompt": "你好",
        "history": empty,
        "max_length": empty,
        "top_p": empty,
        "temperature": empty,
        "model": empty,
    }
    assert server.post("/chatglm", body).json()["status"] == 200


def test_numbers_as_text(server):
    as_numbers = server.post("/chatglm", {"prompt": "你好", "temperature": 0, "max_length": 40}).json()
    as_text = server.post("/chatglm", {"prompt": "你好", "temperature": "0", "max_length": "40"}).json()
    assert as_numbers["response"] == as_text["response"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
def test_any_content_type(server, content_type):
    body = json.dumps({"prompt": "你好", **GREEDY}).encode()
    assert server.post("/chatglm", body, headers={"content-type": content_type}).json()["status"] == 200


def test_the_next_turn_sends_the_history_back(server):
    first = server.post("/chatglm", {"prompt": "你好", **GREEDY}).json()
    second = server.post("/chatglm", {"prompt": "再见", "history": first["history"], "temperature": 0}).json()
    assert second["history"][:1] == first["history"] and len(second["history"]) == 2


def test_a_prefix_by_name(server):
    texts = {
        name: server.post("/chatglm", {"prompt": "你好", "model": name, **GREEDY}).json()["response"]
        for name in ("base", "chatglm2-tiny", "ads", "talk", "proj")
    }
    assert texts["base"] == texts["chatglm2-tiny"]
    assert len(set(texts.values())) == 4


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"history": []}, 400, "prompt: missing"),
        ({"prompt": 5}, 400, "prompt: .*string"),
        ({"prompt": "a", "history": [["x"]]}, 400, r"history\[0\]"),
        ({"prompt": "a", "history": "x"}, 400, "history: .*array"),
        ({"prompt": "a", "temperature": 3}, 400, r"temperature: .*2 \(got 3\)"),
        ({"prompt": "a", "temperature": "warm"}, 400, "temperature: "),
        ({"prompt": "a", "max_length": 0}, 400, "max_length: "),
        ({"prompt": "a", "max_length": 5}, 400, "max_length is 5"),
        (
            {"prompt": "a", "model": "nobody"},
            404,
            "there is no model 'nobody'; there are chatglm2-tiny, ads, proj, talk",
        ),
        (b"{", 400, "not JSON"),
        (b"", 400, "not JSON"),
        ([], 400, "body: "),
    ],
)
def test_errors_have_the_same_shape(server, body, status, text):
    answer = server.post("/chatglm", body)
    assert answer.status_code == status
    content = answer.json()
    assert set(content) == {"response", "history", "status", "time", "error"}
    assert content["status"] == status and content["response"] == ""
    assert re.search(text, content["error"]), content["error"]


def test_get_is_no_route(server):
    answer = server.get("/chatglm")
    assert answer.status_code == 405 and answer.json()["status"] == 405


def test_a_history_too_long_says_how_much_was_dropped(server):
    history = [["白色的衣身" * 20, "十分百搭" * 20]] * 60
    answer = server.post("/chatglm", {"prompt": "你好", "history": history, "temperature": 0, "max_length": 700})
    assert 0 < int(answer.headers["x-history-dropped"]) <= 60
    assert len(answer.json()["history"]) == 61
    assert "x-history-dropped" not in server.post("/chatglm", {"prompt": "你好", **GREEDY}).headers


def test_the_example_client(server):
    command = [sys.executable, str(REPO / "scripts" / "request_example.py"), "你好", "--url", f"{server.url}/chatglm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2
    failed = subprocess.run([*command, "--model", "nobody"], capture_output=True, text=True, timeout=300)
    assert failed.returncode == 1 and "404: there is no model 'nobody'" in failed.stderr
