"""Many at once: the same answers as one by one, places freed, queue and time bounded, the worker's death told to everybody."""

import asyncio
import contextlib
import random
import threading

import httpx
import openai
import pytest

from ptuning.families.chatglm2.template import build_prompt
from ptuning.generation import Engine, GenerationRequest
from ptuning.serving.access import Metrics
from ptuning.serving.app import create_app
from ptuning.serving.connections import HttpConfig
from ptuning.serving.server import Server
from tests.serving.conftest import PREFIXES, ask_together, running, wait_until

QUESTIONS = ["你好", "再见", "类型#上衣*材质#牛仔布*颜色#白色", "1", "请介绍一下自己。" * 8, "类型#裙*风格#简约"]


def body(content: str, model: str = "base", **more) -> dict:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16} | more


def one_by_one(worker, requests) -> list[str]:
    """What the engine answers when it has one request at a time, and nothing kept between them."""
    texts, template = [], worker.template
    for request in requests:
        text = build_prompt(request["messages"][0]["content"])
        ids = [*template.begin_ids, *template.encode_text([text])[0]]
        prefix = worker.registry.find(request["model"]).prefix
        with Engine(worker.loaded.model, template.stop_ids) as engine:
            tokens = engine.submit([GenerationRequest(0, ids, request["max_tokens"], prefix=prefix)])
            made = [token.token for token in tokens if token.token is not None]
        texts.append(template.decode(made).strip())
    return texts


def test_any_mixture_answers_as_one_by_one(prefix_folders):
    chance = random.Random(0)
    names = ["base", *PREFIXES]
    requests = [
        body(chance.choice(QUESTIONS), names[i % 4], max_tokens=chance.randrange(1, 40), stream=i % 3 == 0)
        for i in range(24)
    ]
    with running(prefix_folders) as server:
        expected = one_by_one(server.worker, requests)  # before anything is asked, the worker's thread is idle

        assert ask_together(server, requests, chance) == expected
    assert len(set(expected)) > 8


def test_requests_share_steps(gated):
    with gated() as (server, gate), contextlib.ExitStack() as stack:
        answers = [Ask(stack, server, body(QUESTIONS[0], name, max_tokens=5)) for name in ("base", *PREFIXES)]
        wait_until(lambda: server.worker.stats().waiting == 4, "all are queued")
        gate.open()
        for answer in answers:
            assert answer.result().status_code == 200
        # One step for the four prompts (the first may have gone ahead alone), then 4 tokens each.
        assert gate.steps <= 10


class Ask:
    """A request in a thread."""

    def __init__(self, stack, server, content, path="/v1/chat/completions", headers=None):
        self.done: httpx.Response | None = None
        self.client = stack.enter_context(httpx.Client(timeout=300, headers=headers))
        self.thread = threading.Thread(target=self._run, args=(server.url + path, content), daemon=True)
        self.thread.start()

    def _run(self, url, content):
        self.done = self.client.post(url, json=content)

    def result(self) -> httpx.Response:
        self.thread.join(30)
        assert self.done is not None, "no answer came"
        return self.done


# --- going away ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place_within_one_step(gated, stream):
    with gated(max_concurrent=2) as (server, gate):
        engine = server.worker.engine

        async def leave():
            async with httpx.AsyncClient(timeout=300) as client:
                request = client.post(
                    server.url + "/v1/chat/completions", json=body("你好", stream=stream, max_tokens=500)
                )
                task = asyncio.ensure_future(request)
                while not engine.has_work:
                    await asyncio.sleep(0.005)
                gate.let(2)
                while gate.asked < 3:  # two are made, the third waits
                    await asyncio.sleep(0.005)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        wait_until(lambda: not server.worker._commands.empty(), "the server notices")
        assert len(engine.rows) == 1
        gate.let(1)  # the step that was under way
        wait_until(lambda: not engine.rows, "the place is free")
        assert gate.steps == 3 and server.worker.stats().waiting == 0


def test_a_client_that_goes_away_while_it_waits(gated):
    with gated(max_concurrent=1) as (server, gate), contextlib.ExitStack() as stack:
        first = Ask(stack, server, body("你好", max_tokens=3))
        wait_until(lambda: server.worker.engine.has_work, "the first has begun")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/chatglm", json={"prompt": "再见"}, timeout=0.2)
        gate.open()
        assert first.result().status_code == 200
        wait_until(lambda: not server.worker.stats().waiting and not server.worker.engine.has_work, "nothing is left")
        answered = server.get("/metrics").text
        assert 'ptuning_requests_total{model="chatglm2-tiny",route="/chatglm",status="499"} 1.0' in answered


def test_a_stop_string_frees_the_place(server):
    answer = server.chat(stop="！", max_tokens=2000).json()
    assert answer["choices"][0]["message"]["content"] == "你好"
    wait_until(lambda: not server.worker.engine.has_work, "nothing runs")


# --- bounds -------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_a_429_with_retry_after(gated):
    with gated(max_concurrent=1, max_queue=2) as (server, gate), contextlib.ExitStack() as stack:
        waiting = [Ask(stack, server, body("你好", max_tokens=2)) for _ in range(3)]
        wait_until(lambda: server.worker.places.live == 3, "three are there")
        refused = server.chat()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        rest = server.post("/chatglm", {"prompt": "你好"})
        assert rest.status_code == rest.json()["status"] == 429 and int(rest.headers["retry-after"]) >= 1
        too_many = server.chat(n=4)
        assert too_many.status_code == 400 and "the server takes 3" in too_many.json()["error"]["message"]
        gate.open()
        assert [ask.result().status_code for ask in waiting] == [200] * 3
        assert server.chat(n=3).status_code == 200


def test_openai_client_sees_a_rate_limit(gated):
    with gated(max_concurrent=1, max_queue=0) as (server, gate), contextlib.ExitStack() as stack:
        first = Ask(stack, server, body("你好", max_tokens=1))
        wait_until(lambda: server.worker.places.live == 1, "one runs")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**body("你好"))
        gate.open()
        assert first.result().status_code == 200


def test_the_time_limit_ends_a_request_and_only_that(gated):
    with gated(request_timeout=0.3) as (server, gate), contextlib.ExitStack() as stack:
        slow = Ask(stack, server, body("你好", max_tokens=50))
        wait_until(lambda: gate._permits._value == 0 and server.worker.engine.has_work, "it has begun")
        threading.Timer(0.5, gate.open).start()
        answer = slow.result()
        assert answer.status_code == 504 and "0.3 s (--request_timeout)" in answer.json()["error"]["message"]
        assert not server.worker.engine.has_work
        assert server.chat(max_tokens=2).status_code == 200


def test_the_time_limit_in_a_stream_is_an_error_event(gated):
    with gated(request_timeout=0.4) as (server, gate):
        gate.let(2)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(**body("你好", max_tokens=50, stream=True))
        threading.Timer(0.6, gate.open).start()
        with pytest.raises(openai.APIError, match="request_timeout"):
            list(stream)


def test_memory_is_bounded_by_the_token_budget(prefix_folders):
    with running(prefix_folders, batch_tokens=700) as server:
        engine = server.worker.engine

        async def ask_all():
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                asks = (client.chat.completions.create(**body("你好", name, max_tokens=100)) for name in PREFIXES)
                return await asyncio.gather(*asks, *(client.chat.completions.create(**body("1")) for _ in range(5)))

        assert len(asyncio.run(ask_all())) == 8
        rows, columns = engine.cache.store.shape[2], engine.cache.store.shape[4]
        assert rows * columns <= 700 + 128 * rows  # columns come in steps of 128
        assert engine.prefix_cache.tokens <= 700 // 4


def test_a_dialogue_computes_only_what_is_new(prefix_folders):
    with running(prefix_folders) as server:
        model, sizes = server.worker.loaded.model, []
        forward = model.forward

        def counted(*args, **kwargs):
            if kwargs["input_ids"].shape[1] > 1:
                sizes.append(kwargs["input_ids"].shape[1])
            return forward(*args, **kwargs)

        model.forward = counted
        question = "类型#上衣*材质#牛仔布*颜色#白色*风格#简约" * 3
        for name in ("base", "talk"):
            sizes.clear()
            first = server.post(
                "/chatglm", {"prompt": question, "model": name, "temperature": 0, "max_length": 200}
            ).json()
            second = {"prompt": "再见", "model": name, "temperature": 0, "history": first["history"], "max_length": 400}
            answer = server.post("/chatglm", second).json()
            encode = server.worker.template.tokenizer.encode_text
            before = len(encode(build_prompt(question))) + 2
            after = len(encode(build_prompt("再见", [tuple(first["history"][0])]))) + 2
            assert sizes[0] == before and sizes[1] <= after - before + 2
            # and the same answer as without anything kept
            again = server.post("/chatglm", second | {"model": name, "history": [tuple(first["history"][0])]}).json()
            assert again["response"] == answer["response"]


# --- death --------------------------------------------------------------------------------------------------------------


def test_the_workers_death_is_told_to_everybody(gated):
    with gated(max_concurrent=2) as (server, gate), contextlib.ExitStack() as stack:
        asked = [Ask(stack, server, body("你好", stream=i == 1)) for i in range(4)]
        wait_until(lambda: server.worker.places.live == 4, "all are there")

        def broken():
            raise RuntimeError("a bug")

        gate._step = broken
        gate.open()
        results = [ask.result() for ask in asked]
        assert sorted(result.status_code for result in results) == [200, 503, 503, 503]  # the stream had begun
        for result in results:
            assert "the model's thread has failed and the server ends; ask again" in result.text
            assert "a bug" not in result.text and f"(request {result.headers['x-request-id']})" in result.text
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "worker died"
        for later in (server.chat(), server.chat(stream=True), server.post("/chatglm", {"prompt": "你好"})):
            assert later.status_code == 503 and "has failed" in later.text
        key = {"Authorization": "Bearer admin-key-for-tests"}
        assert server.post("/v1/prefixes", {"name": "x", "path": "y"}, headers=key).status_code == 503


def test_the_process_ends_when_the_worker_has_died(gated):
    """With a status by which systemd starts a new one, and not before those who wait have their answer."""
    with gated() as (served, gate), contextlib.ExitStack() as stack:
        config = HttpConfig(create_app(served.worker, served.options, Metrics()), 100, port=0, log_level="error")
        server = Server(config, served.worker, served.options)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "it listens")
        served.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        asked = [Ask(stack, served, body("你好")) for _ in range(3)]
        wait_until(lambda: served.worker.places.live == 3, "all are there")
        assert server.status == 0

        def broken():
            raise RuntimeError("a bug")

        gate._step = broken
        gate.open()
        assert [ask.result().status_code for ask in asked] == [503] * 3
        thread.join(120)
        assert not thread.is_alive() and server.status == 1
        told = []
        served.worker.on_death(lambda: told.append("late"))
        assert told == ["late"]


def test_a_request_that_does_not_fit_into_memory_fails_alone(gated):
    with gated() as (server, gate):
        step, once = gate._step, []

        def no_memory():
            if not once:
                once.append(1)
                forward = server.worker.loaded.model.forward

                def fail(*args, **kwargs):
                    server.worker.loaded.model.forward = forward
                    raise MemoryError("out of memory")

                server.worker.loaded.model.forward = fail
            return step()

        gate._step = no_memory
        gate.open()
        answer = server.chat()
        assert answer.status_code == 400 and "doesn't fit into memory" in answer.json()["error"]["message"]
        assert server.chat().status_code == 200
        assert server.get("/health").status_code == 200


def test_sequential_answers_one_at_a_time(gated):
    with gated(engine="sequential", max_concurrent=8, max_queue=8) as (server, gate), contextlib.ExitStack() as stack:
        asked = [Ask(stack, server, body("你好", max_tokens=3)) for _ in range(4)]
        wait_until(lambda: server.worker.places.live == 4, "all are there")
        gate.open()
        assert [ask.result().status_code for ask in asked] == [200] * 4
        assert gate.steps == 12 and server.worker.engine.prefix_cache.capacity == 0


def test_figures(server):
    server.chat(model="ads", max_tokens=5)
    text = server.get("/metrics").text
    for line in (
        'ptuning_requests_total{model="ads",route="/v1/chat/completions",status="200"}',
        'ptuning_tokens_total{kind="prompt",model="ads"}',
        'ptuning_tokens_total{kind="answer",model="ads"}',
        'ptuning_first_token_seconds_count{model="ads"}',
        'ptuning_between_tokens_seconds_count{model="ads"}',
        "ptuning_running 0.0",
        "ptuning_queue 0.0",
    ):
        assert line in text
    assert server.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
