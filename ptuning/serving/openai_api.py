"""OpenAI's routes: /v1/models, /v1/chat/completions, /v1/completions; and /v1/prefixes, in the same style."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ptuning.families import Template
from ptuning.generation import GenerationRequest, Token
from ptuning.serving.answering import (
    DROPPED,
    Asked,
    EventStream,
    Services,
    ask,
    default,
    find,
    sampling_params,
    while_connected,
)
from ptuning.serving.backend import Served
from ptuning.serving.bodies import described, read_body, with_id
from ptuning.serving.detokenize import Piece
from ptuning.serving.errors import ApiError
from ptuning.serving.grammar import Grammar, Grammars
from ptuning.serving.messages import dialogue_from
from ptuning.serving.openai_schema import ChatRequest, CompletionRequest, PrefixRequest
from ptuning.serving.prompts import Prompt

DONE = "data: [DONE]\n\n"
_COMPLETION_TOKENS = 16  # OpenAI's default on /v1/completions


def router(services: Services) -> APIRouter:
    """The routes."""
    routes, backend = APIRouter(), services.backend
    template = backend.template
    names, grammars = TokenTexts(template), Grammars(template)

    @routes.get("/v1/models")
    async def models() -> dict:
        """The base, then the prefixes."""
        return {"object": "list", "data": [model_object(served) for served in backend.served()]}

    @routes.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> dict:
        """One of them."""
        return model_object(find(services, request, name))

    @routes.post("/v1/chat/completions", openapi_extra=described(ChatRequest, streams=True))
    async def chat(request: Request) -> Response:
        """The assistant's next message."""
        body = await read_body(request, ChatRequest)
        served = find(services, request, body.model)
        dialogue = replace(dialogue_from(body.messages), source_prefix=served.source_prefix)
        form_of_text = await asyncio.to_thread(_grammar, grammars, body)
        prompt = services.prompts.chat(dialogue, max_new_tokens=body.max_new_tokens)
        request.state.prompt = dialogue.prompt
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        stops = [*body.stops, *prompt.stops]
        asked = ask(
            services, request, served, _wanted(body, [prompt], logprobs, form_of_text, template), stops, strip=True
        )
        form = _ChatForm(served.name, asked, names, body.logprobs or False)
        return await _answer(request, asked, form, body, {DROPPED: str(prompt.dropped)} if prompt.dropped else {})

    @routes.post("/v1/completions", openapi_extra=described(CompletionRequest, streams=True))
    async def complete(request: Request) -> Response:
        """How a text goes on."""
        body = await read_body(request, CompletionRequest)
        served = find(services, request, body.model)
        prompts = [services.prompts.plain(text, body.max_tokens or _COMPLETION_TOKENS) for text in body.texts]
        request.state.prompt = body.texts
        wanted = _wanted(body, prompts, body.logprobs, await asyncio.to_thread(_grammar, grammars, body), template)
        asked = ask(services, request, served, wanted, body.stops, strip=False)
        form = _PlainForm(served.name, asked, names, body.logprobs is not None)
        return await _answer(request, asked, form, body, {})

    @routes.post("/v1/prefixes", openapi_extra=described(PrefixRequest))
    async def add_prefix(request: Request) -> dict:
        """Loads a prefix and serves it from now on. Needs the admin key."""
        body = await read_body(request, PrefixRequest)
        return model_object(await backend.add_prefix(body.name, body.path))

    @routes.delete("/v1/prefixes/{name}")
    async def remove_prefix(name: str) -> dict:
        """Serves a prefix no longer; answers under way finish. Needs the admin key."""
        await backend.remove_prefix(name)
        return {"id": name, "object": "model", "deleted": True, "default_model": default(services).name}

    return routes


def _wanted(
    body: ChatRequest | CompletionRequest,
    prompts: list[Prompt],
    logprobs: int | None,
    grammar: Grammar | None,
    template: Template,
) -> list[GenerationRequest]:
    """n answers to each prompt, or best_of, each with a seed of its own."""
    wanted: list[GenerationRequest] = []
    made = body.best_of or body.count
    if made > body.count:
        logprobs = logprobs or 0  # to compare them by
    for prompt in prompts:
        for _ in range(made):
            rule = sampling_params(
                template,
                body.temperature,
                body.top_p,
                seed=None if body.seed is None else body.seed + len(wanted),
                frequency_penalty=body.frequency_penalty or 0.0,
                presence_penalty=body.presence_penalty or 0.0,
                constraint=grammar,
                **_given(body),
            )
            request = GenerationRequest(len(wanted), prompt.ids, prompt.max_new_tokens, rule, logprobs=logprobs)
            wanted.append(request)
    return wanted


def _given(body: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """What OpenAI doesn't have; the model's own rule where it isn't given."""
    rule = {"top_k": body.top_k, "min_p": body.min_p, "repetition_penalty": body.repetition_penalty}
    return {name: max(value, 0) for name, value in rule.items() if value is not None}


def _grammar(grammars: Grammars, body: ChatRequest | CompletionRequest) -> Grammar | None:
    if body.guided_choice:
        return grammars.choice(body.guided_choice, "guided_choice")
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return grammars.json_object()
    return grammars.json_schema(form.json_schema.schema_, "response_format")


def _best(pieces: list[Piece], made: int, count: int) -> list[Piece]:
    """Of `made` answers to each prompt the `count` likeliest, by their tokens' mean log probability."""
    kept: list[Piece] = []
    for start in range(0, len(pieces), made):
        ranked = sorted(pieces[start : start + made], key=_likelihood, reverse=True)
        kept += ranked[:count]
    return kept


def _likelihood(piece: Piece) -> float:
    values = [token.logprob for token in piece.tokens if token.logprob is not None]
    return sum(values) / len(values) if values else float("-inf")


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def model_object(served: Served) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "ptuning",
        "kind": served.kind,
        "pre_seq_len": served.pre_seq_len,
    }


class TokenTexts:
    """Names tokens in log probabilities."""

    def __init__(self, template: Template):
        self.template = template

    def text(self, token: int) -> str:
        return self.template.token_bytes(token).decode(errors="replace")

    def chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The `logprobs` of a chat choice."""
        content = [
            self._entry(token.token, token.logprob) | {"top_logprobs": [self._entry(*top) for top in token.top]}
            for token in tokens
            if token.token is not None and token.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def plain(self, piece: Piece) -> dict[str, Any]:
        """The `logprobs` of a completion's choice."""
        return {
            "tokens": [self.text(token.token) for token in piece.tokens if token.token is not None],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{self.text(t): value for t, value in token.top} for token in piece.tokens],
            "text_offset": list(piece.starts),
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.template.token_bytes(token)
        # JSON has no infinity, and -9999 is what OpenAI sends for it.
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class _Form:
    """How answers are written. `frame` is what all objects of one request share."""

    object, chunk_object, mark = "", "", ""

    def __init__(self, model: str, asked: Asked, names: TokenTexts, logprobs: bool):
        self.names, self.wants_logprobs = names, logprobs
        self.frame = {"id": f"{self.mark}-{uuid.uuid4().hex}", "created": asked.created, "model": model}

    def whole(self, pieces: list[Piece], usage: dict[str, int]) -> dict[str, Any]:
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return self.frame | {"object": self.object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.frame | {"object": self.chunk_object, "choices": choices}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of the events before an answer's first text."""
        raise NotImplementedError

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the events that a piece becomes."""
        raise NotImplementedError


class _ChatForm(_Form):
    object, chunk_object, mark = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index, piece):
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(piece), "finish_reason": piece.finish}

    def opening(self, index):
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def parts(self, index, piece):
        made = []
        if piece.text or (piece.tokens and self.wants_logprobs):
            logprobs = self._logprobs(piece)
            made.append({"index": index, "delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None})
        if piece.finish:
            made.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish})
        return made

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return self.names.chat(piece.tokens) if self.wants_logprobs else None


class _PlainForm(_Form):
    object, chunk_object, mark = "text_completion", "text_completion", "cmpl"

    def choice(self, index, piece):
        logprobs = self.names.plain(piece) if self.wants_logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def opening(self, index):
        return []

    def parts(self, index, piece):
        wanted = piece.text or piece.finish or (piece.tokens and self.wants_logprobs)
        return [self.choice(index, piece)] if wanted else []


async def _answer(
    request: Request, asked: Asked, form: _Form, body: ChatRequest | CompletionRequest, headers: dict[str, str]
) -> Response:
    if body.stream:
        return EventStream(request, asked, _events(request, asked, form, body), headers)
    pieces = await while_connected(request, asked, asked.whole())
    if body.best_of is not None:
        pieces = _best(pieces, body.best_of, body.count)
    request.state.answer = [piece.text for piece in pieces]
    return JSONResponse(form.whole(pieces, asked.usage.body()), headers=headers)


async def _events(
    request: Request, asked: Asked, form: _Form, body: ChatRequest | CompletionRequest
) -> AsyncIterator[str]:
    usage = {"usage": None} if body.wants_usage else {}
    for index in range(len(asked.texts)):
        for choice in form.opening(index):
            yield event(form.chunk([choice]) | usage)
    try:
        async for index, piece in asked.pieces():
            for choice in form.parts(index, piece):
                yield event(form.chunk([choice]) | usage)
    except ApiError as error:
        # The status is out already; clients of this format look for an error event.
        request.state.error, request.state.cut = error.code, error.status
        yield event(with_id(error, request).body())
        return
    if body.wants_usage:
        yield event(form.chunk([]) | {"usage": asked.usage.body()})
    yield DONE
