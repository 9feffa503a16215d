"""vLLM's HTTP side, over real HTTP in this process, with answers that can be told from what was asked."""

import asyncio
import json
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ptuning.families import Template
from tests.serving.conftest import wait_until


def answer_to(body: dict) -> str:
    """The text that a fake answers with: it names the prefix and what was asked."""
    prefix = (body.get("kv_transfer_params") or {}).get("prefix", body.get("model") or "base")
    return f"你好，{prefix[:8]} {sum(body['token_ids']) % 1000}。再见。"


class FakeVllm:
    """`with FakeVllm(template) as vllm`: listens at `vllm.url`.

    Args:
        template: encodes answers.
        max_model_len, root: what it says of its model.
    """

    def __init__(self, template: Template, max_model_len: int = 2560, root: str = "/models/elsewhere"):
        self.template, self.max_model_len, self.root = template, max_model_len, root
        self.bodies: list[dict] = []
        self.key: str | None = None
        self.loras: set[str] = set()
        self.loaded: list[dict] = []
        self.fail: dict | None = None  # instead of an answer: status, or an error in the stream
        self.first = 10**6  # tokens after which answers wait
        self.running = self.port = 0

    def __enter__(self) -> "FakeVllm":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens, after `kill` at the same port."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/inference/v1/generate", self._generate, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=self.port, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started, "the fake listens")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(serve())

    def kill(self) -> None:
        """As SIGKILL does: connections break, nobody listens."""

        def abort() -> None:
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.server.should_exit = self.server.force_exit = True
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(abort)
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()
        self.running = 0

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200)

    async def _models(self, request: Request) -> Response:
        base = {"id": "m", "root": self.root, "parent": None, "max_model_len": self.max_model_len}
        return JSONResponse({"object": "list", "data": [{"id": "lora", "parent": "m"}, base]})

    async def _load(self, request: Request) -> Response:
        self.loaded.append(await request.json())
        self.loras.add(self.loaded[-1]["lora_name"])
        return Response("Success")

    def answer_ids(self, body: dict) -> list[int]:
        """What is answered, without an end token."""
        return self.template.encode_text([answer_to(body)])[0]

    def prompt_logprobs(self, body: dict) -> list[dict | None]:
        """An entry a token of the prompt, placeholders included."""
        raise NotImplementedError

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.key = request.headers.get("authorization")
        if self.fail is not None and "status" in self.fail:
            return JSONResponse({"error": {"message": "a secret of vLLM's"}}, self.fail["status"])
        if body.get("model") not in (None, *self.loras):
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if "prompt_logprobs" in body["sampling_params"]:
            try:
                return JSONResponse({"choices": [], "prompt_logprobs": self.prompt_logprobs(body)})
            except ValueError as error:  # NaN
                return JSONResponse({"error": {"message": str(error)}}, 400)
        return StreamingResponse(self._events(body, request), media_type="text/event-stream")

    async def _events(self, body: dict, request: Request):
        rule = body["sampling_params"]
        ids = [*self.answer_ids(body), *rule["stop_token_ids"]][: rule["max_tokens"]]
        self.running += 1
        try:
            if self.fail is not None:
                yield f"data: {json.dumps({'error': self.fail})}\n\n"
                return
            for place, token in enumerate(ids):
                while place >= self.first:
                    if await request.is_disconnected():
                        return
                    await asyncio.sleep(0.005)
                finish = None
                if place == len(ids) - 1:
                    finish = "stop" if token in rule["stop_token_ids"] else "length"
                choice = {"index": 0, "token_ids": [token], "finish_reason": finish, "logprobs": None}
                if "logprobs" in rule:
                    top = [{"token_id": token + i, "logprob": -0.5 - i} for i in range(rule["logprobs"] + 1)]
                    choice["logprobs"] = {"content": [{"token_id": token, "logprob": -0.5, "top_logprobs": top}]}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
