"""`ptuning serve --engine vllm`: the unchanged front over an endpoint that speaks as vLLM does."""

import contextlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from ptuning.errors import ConfigError
from ptuning.loading import load_template
from ptuning.methods import Stored
from ptuning.serving.app import create_app
from ptuning.serving.backend import Served
from ptuning.serving.options import ServeOptions, parse
from ptuning.serving.server import build
from tests.serving.conftest import ADMIN, BASE, PREFIXES, Running, wait_until
from tests.serving.fake_vllm import FakeVllm, answer_to

KEY = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def template():
    return load_template(BASE)


@pytest.fixture
def vllm(template):
    with FakeVllm(template) as made:
        yield made


@contextlib.contextmanager
def front(fakes, store, prefixes=(), **options):
    """A server before some fakes."""
    settings = ServeOptions(
        **{
            "model": str(BASE),
            "prefix": tuple((name, str(folder)) for name, folder in dict(prefixes).items()),
            "engine": "vllm",
            "vllm_url": tuple(fake.url for fake in fakes),
            "prefix_store": str(store),
            "admin_key": ADMIN,
        }
        | options
    )
    backend, metrics = build(settings)
    backend.start()
    server = uvicorn.Server(uvicorn.Config(create_app(backend, settings, metrics), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server listens")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", backend, metrics, settings)
    finally:
        backend.close()
        server.should_exit = True
        thread.join(timeout=60)


def text(reply) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def streamed(server, **body) -> tuple[str, dict]:
    """The text of a streamed answer, and the last choice."""
    asked = {
        "model": "base",
        "messages": [{"role": "user", "content": "你好"}],
        "max_tokens": 64,
        "stream": True,
    } | body
    lines = server.post("/v1/chat/completions", asked).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for choice in choices), choices[-1]


def test_answers_name_their_prefix_by_its_digest(vllm, tmp_path, prefix_folders):
    with front([vllm], tmp_path, prefix_folders) as server:
        kinds = {one["id"]: one["pre_seq_len"] for one in server.get("/v1/models").json()["data"]}
        assert kinds == {"chatglm2-tiny": 0} | {name: length for name, (length, _) in PREFIXES.items()}
        digests = set()
        for name in kinds:
            said = text(server.chat(model=name, max_tokens=64, seed=7, temperature=0.5, top_p=0, presence_penalty=1))
            body = vllm.bodies[-1]
            assert said == answer_to(body)
            rule = body["sampling_params"]
            assert rule == rule | {
                "temperature": 0.5,
                "seed": 7,
                "presence_penalty": 1,
                "max_tokens": 64,
                "detokenize": False,
            }
            assert 0 < rule["top_p"] < 1e-6 and rule["stop_token_ids"] == [2] and "stop" not in rule
            length = kinds[name]
            assert body["token_ids"][:length] == [0] * length and 0 not in body["token_ids"][length:]
            if length:
                digest = body["cache_salt"]
                assert body["kv_transfer_params"] == {"prefix": digest, "length": length}
                assert (tmp_path / f"{digest}.safetensors").is_file()
                digests.add(digest)
            else:
                assert "cache_salt" not in body and "kv_transfer_params" not in body
            assert streamed(server, model=name)[0] == answer_to(vllm.bodies[-1])
        assert len(digests) == 3
        usage = server.chat(model="ads", max_tokens=64).json()["usage"]
        assert usage["prompt_tokens"] == len(vllm.bodies[-1]["token_ids"]) - 8, "without the placeholders"
        figures = server.get("/metrics").text
        assert 'ptuning_tokens_total{kind="answer",model="ads"}' in figures and "ptuning_running 0.0" in figures


def test_stop_strings_and_limits_are_this_sides(vllm, tmp_path):
    with front([vllm], tmp_path, vllm_key="k") as server:
        vllm.first = 30  # what isn't wanted any more isn't waited for
        whole = streamed(server, stop="。再")
        assert whole[0] == answer_to(vllm.bodies[-1]).partition("。再")[0] and whole[1]["finish_reason"] == "stop"
        wait_until(lambda: not vllm.running, "the place in vLLM is free")
        reply = server.chat(max_tokens=3).json()["choices"][0]
        assert reply["finish_reason"] == "length" and vllm.key == "Bearer k"
        found = server.chat(max_tokens=3, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        assert [(one["logprob"], len(one["top_logprobs"])) for one in found] == [(-0.5, 2)] * 3
        several = server.chat(n=3, max_tokens=64).json()["choices"]
        assert len(several) == 3 and {one["finish_reason"] for one in several} == {"stop"}


def test_a_client_that_goes_away_frees_its_place(vllm, tmp_path):
    vllm.first = 2
    with front([vllm], tmp_path, max_concurrent=1) as server, httpx.Client() as client:
        body = {"model": "base", "messages": [{"role": "user", "content": "你好"}], "stream": True}
        with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()  # closing it would close the connection
            next(lines)
            wait_until(lambda: vllm.running == 1, "it runs")
        wait_until(lambda: not vllm.running, "the place in vLLM is free")
        vllm.first = 10**6
        assert text(server.chat(max_tokens=64))


def test_places(vllm, tmp_path):
    vllm.first = 1
    with front([vllm], tmp_path, max_concurrent=2, max_queue=1) as server, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.chat, max_tokens=64) for _ in range(3)]
        full = {"status": "ok", "running": 2, "waiting": 1}
        wait_until(lambda: server.get("/health").json() == full and vllm.running == 2, "two of three run")
        busy = server.chat()
        assert busy.status_code == 429 and "--max_concurrent for each --vllm_url" in busy.json()["error"]["message"]
        assert len(vllm.bodies) == 2, "the third waits on this side"
        queued = 'ptuning_queue_seconds_count{model="chatglm2-tiny"}'
        assert f"{queued} 2.0" in server.get("/metrics").text, "the third still waits for its place"
        vllm.first = 10**6
        assert {one.result().status_code for one in asked} == {200}
        assert f"{queued} 3.0" in server.get("/metrics").text


def test_time(vllm, tmp_path):
    vllm.first = 1
    with front([vllm], tmp_path, request_timeout=0.2) as server:
        late = server.chat(max_tokens=64)
        assert late.status_code == 504 and "not finished within 0.2 s (--request_timeout)" in late.text
        wait_until(lambda: not vllm.running, "the place in vLLM is free")


def test_closing_answers_what_runs(vllm, tmp_path):
    vllm.first = 1
    with front([vllm], tmp_path) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, max_tokens=64)
        wait_until(lambda: vllm.running == 1, "it runs")
        server.worker.drain()
        assert not server.worker.wait_idle(0) and server.chat().status_code == 503
        server.worker.close()
        assert asked.result().status_code == 503 and server.worker.wait_idle(60)


def test_replicas(template, tmp_path, prefix_folders):
    """A prefix stays at one, the base goes to the least busy; one that fails before the first token is replaced by another."""
    with FakeVllm(template) as one, FakeVllm(template) as two, front([one, two], tmp_path, prefix_folders) as server:
        fakes = [one, two]
        for _ in range(4):
            text(server.chat(model="ads"))
        assert sorted(len(fake.bodies) for fake in fakes) == [0, 4]
        for fake in fakes:
            fake.bodies.clear()
            fake.first = 0
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(server.chat) for _ in range(6)]
            wait_until(lambda: [len(fake.bodies) for fake in fakes] == [3, 3], "three each")
            for fake in fakes:
                fake.first = 10**6
            assert {one.result().status_code for one in asked} == {200}
        for failure in ({"status": 500}, {"message": "load failed", "code": 500}):
            one.fail, two.fail = failure, None
            assert {server.chat(model=name).status_code for name in ("base", *PREFIXES)} == {200}
        one.fail = two.fail = {"status": 500}
        none = server.chat()
        assert none.status_code == 503 and "no vLLM can answer at the moment" in none.text and "secret" not in none.text
        one.fail = two.fail = {"status": 400}
        wrong = server.chat()
        assert wrong.status_code == 400 and "the server's log says why" in wrong.text and "secret" not in wrong.text
        one.fail = two.fail = None
        two.kill()
        assert {server.chat(model=name).status_code for name in ("base", "base", *PREFIXES)} == {200}
        assert server.get("/health").status_code == 200
        two.start()
        before = len(two.bodies)
        wait_until(lambda: all(replica.up for replica in server.worker.replicas.all), "it is asked again")
        for name in ("base", "base", *PREFIXES):
            text(server.chat(model=name))
        assert len(two.bodies) > before or len(one.bodies) > 0


def test_vllm_is_killed_under_forty_requests(vllm, tmp_path):
    vllm.first = 2
    with front([vllm], tmp_path, max_concurrent=40) as server, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(server.chat, max_tokens=64) for _ in range(40)]
        wait_until(lambda: vllm.running == 40, "all forty run")
        vllm.kill()
        replies = [one.result() for one in asked]
        assert {one.status_code for one in replies} == {503}
        assert all("vLLM failed after" in one.text for one in replies)
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "vLLM down" and server.chat().status_code == 503
        assert server.worker.stats().running == 0
        vllm.first = 10**6
        vllm.start()
        wait_until(lambda: server.get("/health").status_code == 200, "it is back")
        assert text(server.chat(max_tokens=64)) == answer_to(vllm.bodies[-1])


def test_two_servers_share_their_names(vllm, tmp_path, prefix_folders):
    ads, talk = (str(prefix_folders[name]) for name in ("ads", "talk"))
    with front([vllm], tmp_path, {"ads": ads}) as one, front([vllm], tmp_path) as two:
        assert two.chat(model="ads").status_code == 200
        added = two.post("/v1/prefixes", {"name": "late", "path": talk}, headers=KEY)
        assert added.status_code == 200 and added.json()["pre_seq_len"] == 24
        assert one.chat(model="late").status_code == 200
        assert vllm.bodies[-1]["kv_transfer_params"]["length"] == 24
        taken = one.post("/v1/prefixes", {"name": "late", "path": ads}, headers=KEY)
        assert taken.status_code == 409
        wrong = one.post("/v1/prefixes", {"name": "other", "path": str(tmp_path)}, headers=KEY)
        assert wrong.status_code == 400
        assert httpx.delete(f"{one.url}/v1/prefixes/late", headers=KEY).status_code == 200
        assert two.chat(model="late").status_code == 404
        (tmp_path / "names.json").write_text("{")
        assert two.chat(model="ads").status_code == 200, "the last table that could be read"


def test_what_has_no_name_for_a_week_leaves_the_store(vllm, tmp_path, prefix_folders):
    week = time.time() - 8 * 86400
    for name in ("0" * 32 + ".safetensors", "1" * 32 + ".safetensors", "other.safetensors", f"lora-{'2' * 32}"):
        if name.startswith("lora"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapter_config.json").touch()
            os.utime(tmp_path / name / "adapter_config.json", (week, week))
        else:
            (tmp_path / name).touch()
        if not name.startswith("1"):
            os.utime(tmp_path / name, (week, week))
    with front([vllm], tmp_path, prefix_folders) as server:
        named = {f"{one.prefix.prefix}.safetensors" for one in server.worker.served() if one.prefix}
        there = {path.name for path in tmp_path.iterdir()} - {"names.json", "names.lock"}
        assert there == named | {"1" * 32 + ".safetensors", "other.safetensors"} and len(named) == 3
        for name in named:
            os.utime(tmp_path / name, (week, week))
        server.worker.names.sweep()
        assert text(server.chat(model="ads")) and {path.name for path in tmp_path.iterdir()} >= named


def test_many_changes_at_once(vllm, tmp_path, prefix_folders):
    with front([vllm], tmp_path) as one, front([vllm], tmp_path) as two, ThreadPoolExecutor(8) as pool:

        def add(number):
            body = {"name": f"p{number % 6}", "path": str(prefix_folders["ads"])}
            return (one, two)[number % 2].post("/v1/prefixes", body, headers=KEY).status_code

        found = list(pool.map(add, [n for number in range(6) for n in (number, number + 6, number + 3)]))
        assert sorted(found) == [200] * 6 + [409] * 12
        assert {served.name for served in one.worker.served()} == {"chatglm2-tiny", *(f"p{n}" for n in range(6))}


def test_a_lora_is_loaded_with_its_first_request(vllm, tmp_path):
    with front([vllm], tmp_path) as server:
        server.worker.names["low"] = Served("low", 0, "", 0, Stored(lora="lora-abc"), "LoRA")
        assert text(server.chat(model="low", max_tokens=64)) == answer_to(vllm.bodies[-1])
        assert vllm.loaded == [{"lora_name": "lora-abc", "lora_path": str(tmp_path / "lora-abc")}]
        assert text(server.chat(model="low", max_tokens=64)) and len(vllm.loaded) == 1
        assert "cache_salt" not in vllm.bodies[-1]


def test_the_context_leaves_room_for_the_prefix(template, tmp_path, prefix_folders, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no prefixes are
    context = template.tokenizer.model_max_length
    with FakeVllm(template, max_model_len=300) as small:
        with front([small], tmp_path, {"ads": prefix_folders["ads"]}) as server:
            assert server.worker.context == 292 < context
            refused = server.post("/v1/prefixes", {"name": "t", "path": str(prefix_folders["talk"])}, headers=KEY)
            assert refused.status_code == 400 and "start vLLM with --max-model-len 316" in refused.text
        small.max_model_len = 9
        with pytest.raises(ConfigError, match="the longest prefix has 8 positions; start it with --max-model-len"):
            build(parse(flags(small, tmp_path)))


def flags(fake, store, *more):
    return ["--engine", "vllm", "--model", str(BASE), "--vllm_url", fake.url, "--prefix_store", str(store), *more]


def test_refused_at_the_start(template, tmp_path, prefix_folders):
    prefix = ("--prefix", f"ads={prefix_folders['ads']}")
    with FakeVllm(template) as one, FakeVllm(template, max_model_len=99) as two:
        with pytest.raises(ConfigError, match=r"the replicas have different --max-model-len .99, 2560."):
            build(parse(flags(one, tmp_path, "--vllm_url", two.url)))
        two.max_model_len = "none"
        with pytest.raises(
            ConfigError, match=r"answers, but not as vLLM does .*vLLM's own server .and its key: --vllm_key."
        ):
            build(parse(flags(two, tmp_path)))
        one.root = str(BASE)
        with pytest.raises(
            ConfigError, match=r"ignores kv_channels .*; give it what ptuning export --format vllm makes"
        ):
            build(parse(flags(one, tmp_path)))
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text(json.dumps({"model_type": "glm", "ptuning_base": "0" * 16}))
        one.root = str(other)
        with pytest.raises(ConfigError, match=r"fingerprint 0{16}.*give both the same model"):
            build(parse(flags(one, tmp_path)))
        one.root = None
        build(parse(flags(one, tmp_path, *prefix)))
        table = tmp_path / "names.json"
        table.write_text(json.dumps(json.loads(table.read_text()) | {"base": "1" * 16}))
        with pytest.raises(ConfigError, match=r"is of the base with fingerprint 1{16}, .*; give each base a folder"):
            build(parse(flags(one, tmp_path)))
        table.write_text("{")
        with pytest.raises(
            ConfigError, match=r"names.json: can't be read as JSON .*: delete it and start every server"
        ):
            build(parse(flags(one, tmp_path)))
        (tmp_path / "names.json").write_text('{"format": "other"}')
        with pytest.raises(ConfigError, match="is 'other' version None, expected 'ptuning-names' version 1"):
            build(parse(flags(one, tmp_path)))
        url = one.url
    with pytest.raises(ConfigError, match=f"nothing answers at {url}; start vLLM first"):
        build(parse(flags(one, tmp_path)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--engine vllm --prefix_store x", "--engine vllm needs --vllm_url"),
        ("--engine vllm --vllm_url http://a", "--engine vllm needs --prefix_store"),
        ("--vllm_url http://a", "--vllm_url is for --engine vllm"),
        ("--prefix_store x", "--prefix_store is for --engine vllm"),
        (
            "--engine vllm --prefix_store x --vllm_url localhost:8000",
            "expected an address such as http://127.0.0.1:8000",
        ),
        (
            "--engine vllm --prefix_store x --vllm_url http://a --dtype float16",
            "--dtype is for this package's own engine",
        ),
        ("--engine vllm --prefix_store x --vllm_url http://a --batch_tokens 9", "--batch_tokens is for this"),
    ],
)
def test_options(line, said):
    with pytest.raises(ConfigError, match=said):
        parse(line.split())


def test_several_addresses():
    line = "--engine vllm --prefix_store x --vllm_url http://a http://b --vllm_url http://c --no_page"
    assert parse(line.split()).vllm_url == ("http://a", "http://b", "http://c")
