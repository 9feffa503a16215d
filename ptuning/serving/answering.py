"""From a request to the text of its answers; shared by REST and OpenAI's format."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ptuning.families import Template
from ptuning.generation import GenerationRequest, SamplingParams
from ptuning.serving.backend import BASE, Answers, Backend, Served, UnknownModel
from ptuning.serving.detokenize import AnswerText, Piece
from ptuning.serving.errors import ApiError
from ptuning.serving.keys import hold
from ptuning.serving.prompts import PromptBuilder

DROPPED = "X-History-Dropped"  # header: old turns that were left out

_COLDEST = 1e-3  # logits divided by less would overflow; nothing but the likeliest token is left there anyway

Result = TypeVar("Result")


@dataclass(frozen=True)
class Services:
    """What the routes work with."""

    backend: Backend
    prompts: PromptBuilder
    default_model: str


@dataclass
class Usage:
    """Tokens of one HTTP request."""

    prompt: int = 0
    answer: int = 0

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
        }


@dataclass
class Asked:
    """The answers to one HTTP request, under way."""

    answers: Answers
    texts: list[AnswerText]
    usage: Usage
    created: int = field(default_factory=lambda: int(time.time()))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the answer, its next piece), until all have finished.

        Raises:
            ApiError: one of them can't be finished.
        """
        async for index, token in self.answers:
            piece = self.texts[index].push(token)
            if piece.finish is not None:
                self.answers.cancel(index)  # ended by a stop string; else it is gone already
            self.usage.answer = sum(text.tokens for text in self.texts)
            if piece.text or piece.tokens or piece.finish:
                yield index, piece

    async def whole(self) -> list[Piece]:
        """Each answer in one piece."""
        parts: list[list[Piece]] = [[] for _ in self.texts]
        async for index, piece in self.pieces():
            parts[index].append(piece)
        return [
            Piece(
                "".join(piece.text for piece in pieces),
                tuple(token for piece in pieces for token in piece.tokens),
                tuple(start for piece in pieces for start in piece.starts),
                pieces[-1].finish,
            )
            for pieces in parts
        ]


def find(services: Services, request: Request, name: str | None) -> Served:
    """The model that a request names; the log, the metrics and the header X-Model learn of it.

    Args:
        name: None: the default model; the base where its prefix has been removed.

    Raises:
        ApiError: there is none.
    """
    served = services.backend.find(name) if name else default(services)
    request.state.model = served.name
    return served


def default(services: Services) -> Served:
    """What answers requests that name no model, now."""
    try:
        return services.backend.find(services.default_model)
    except UnknownModel:
        return services.backend.find(BASE)


def ask(
    services: Services,
    request: Request,
    model: Served,
    wanted: Sequence[GenerationRequest],
    stops: Sequence[str],
    strip: bool,
) -> Asked:
    """Queues the answers that an HTTP request wants.

    Raises:
        ApiError: the queue is full, or the server doesn't take requests.
    """
    backend = services.backend
    if len(wanted) > backend.capacity:
        raise ApiError(
            400,
            f"{len(wanted)} answers are asked for at once and the server takes {backend.capacity} (--max_concurrent + "
            "--max_queue); ask for fewer",
            param="n",
        )
    hold(request, len(wanted))
    answers = backend.submit(model.name, wanted)
    usage = Usage(prompt=sum(len(each.ids) for each in wanted))
    request.state.usage = usage
    return Asked(answers, [AnswerText(backend.template, stops, strip) for _ in wanted], usage)


def sampling_params(template: Template, temperature: float | None, top_p: float | None, **more: Any) -> SamplingParams:
    """The engine's sampling from what a client sent; None is the model's own default. Who asks for greedy answers gets them
    without any other rule of the model's."""
    given = {"temperature": temperature, "top_p": top_p}
    rule = dict(template.sampling) | {name: value for name, value in given.items() if value is not None}
    if rule["temperature"] < _COLDEST:
        rule = {"temperature": 0.0, "top_p": rule["top_p"]}
    return SamplingParams(**rule | more)


async def while_connected(request: Request, asked: Asked, result: Awaitable[Result]) -> Result:
    """Waits for an answer, and gives its place away as soon as the client has gone.

    Raises:
        ApiError: the client has gone; only the log sees it.
    """
    task = asyncio.ensure_future(result)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", "client_gone")
        return task.result()
    finally:
        asked.answers.cancel()
        await _stop(task, watch)


class EventStream(Response):
    """Server-sent events; stops at once, and frees the answers' places, when the client goes away.

    Args:
        request: whose log line says 499 where its client goes away before the end.
        asked: what is streamed.
        events: the events' texts, `data: …` and the blank line included.
        headers: further headers.
    """

    def __init__(self, request: Request, asked: Asked, events: AsyncIterator[str], headers: dict[str, str]):
        self.state, self.asked, self.events = request.state, asked, events
        self.status_code, self.background, self.body = 200, None, b""
        # X-Accel-Buffering: nginx would else collect the events.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            else:
                self.state.cut = 499
        finally:
            self.asked.answers.cancel()
            await _stop(task, watch)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
