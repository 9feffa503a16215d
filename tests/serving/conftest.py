"""A server in this process, on the small model in the repo with three random prefixes, reached over real HTTP."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import settings

from ptuning.checkpoint.manifest import describe
from ptuning.loading import load_base
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix
from ptuning.methods.prefix.checkpoint import save_prefix
from ptuning.serving.access import Metrics
from ptuning.serving.app import create_app
from ptuning.serving.connections import HttpConfig
from ptuning.serving.options import ServeOptions
from ptuning.serving.server import build
from ptuning.serving.worker import Worker
from tests.conftest import REPO

settings.register_profile("no files", database=None)
settings.load_profile("no files")

BASE = REPO / "models" / "chatglm2-tiny"
PREFIXES = {"ads": (8, False), "talk": (24, False), "proj": (5, True)}  # name → length, projection
ADMIN = "admin-key-for-tests"


def wait_until(done: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Polls; fails with `what` when the time is over."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def prefix_folders(tmp_path_factory) -> dict[str, Path]:
    """Random prefixes of the small base, saved as training saves them. Read only."""
    parent = tmp_path_factory.mktemp("prefixes")
    model = load_base(BASE, device="cpu")
    for seed, (name, (length, projection)) in enumerate(PREFIXES.items()):
        torch.manual_seed(seed)
        encoder = attach_prefix(model, length, projection)
        with torch.no_grad():  # strong enough that each changes greedy answers
            (encoder.trans[2] if projection else encoder.embedding).weight.mul_(20 if projection else 4)
        settings = {"pre_seq_len": length, "prefix_projection": projection}
        save_prefix(parent / name, encoder, describe(BASE, "prefix", settings))
        detach_prefix(model)
    return {name: parent / name for name in PREFIXES}


class Gate:
    """Lets the engine make a step only when told to."""

    def __init__(self, engine):
        self._step, self._permits = engine.step, threading.Semaphore(0)
        self.asked = self.steps = 0  # steps begun, and of those allowed
        engine.step = self

    def __call__(self):
        self.asked += 1
        self._permits.acquire()
        self.steps += 1
        return self._step()

    def let(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._permits.release(1_000_000)


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    worker: Worker
    metrics: Metrics
    options: ServeOptions

    def post(self, path: str, body: dict | bytes, **kwargs) -> httpx.Response:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(self.url + path, timeout=300, **content, **kwargs)

    def get(self, path: str, **kwargs) -> httpx.Response:
        return httpx.get(self.url + path, timeout=300, **kwargs)

    def chat(self, content: str = "你好", model: str = "base", **more) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
        return self.post("/v1/chat/completions", body | more)


@contextlib.contextmanager
def running(
    prefixes: dict[str, Path], change: Callable[[Worker], object] | None = None, **options
) -> Iterator[Running]:
    """A real uvicorn on a free port, for as long as the block lasts.

    Args:
        change: is given the worker before it starts.
        **options: of ServeOptions.
    """
    settings = ServeOptions(
        **{"model": str(BASE), "prefix": tuple((n, str(f)) for n, f in prefixes.items()), "admin_key": ADMIN} | options
    )
    worker, metrics = build(settings)
    if change is not None:
        change(worker)
    worker.start()
    config = HttpConfig(create_app(worker, settings, metrics), settings.max_connections, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server listens")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", worker, metrics, settings)
    finally:
        server.should_exit = True
        gate = worker.engine.step
        if isinstance(gate, Gate):
            gate.open()
        worker.close()
        thread.join(timeout=120)


@pytest.fixture(scope="session")
def server(prefix_folders) -> Iterator[Running]:
    """The base and three prefixes with the default options. Tests leave it as they found it."""
    with running(prefix_folders) as made:
        yield made


@pytest.fixture
def gated(prefix_folders) -> Callable[..., contextlib.AbstractContextManager]:
    """`with gated(max_concurrent=1) as (server, gate)`: a server whose engine makes a step only when told to."""

    @contextlib.contextmanager
    def make(**options):
        gates = []
        with running(prefix_folders, lambda worker: gates.append(Gate(worker.engine)), **options) as made:
            yield made, gates[0]

    return make


def ask_together(server, requests, chance):
    """The answers to OpenAI requests that arrive within a fifth of a second, at random."""

    async def ask(client, request, delay):
        await asyncio.sleep(delay)
        if request["stream"]:
            stream = await client.chat.completions.create(**request)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return (await client.chat.completions.create(**request)).choices[0].message.content

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, request, chance.random() / 5) for request in requests))

    return asyncio.run(ask_all())
