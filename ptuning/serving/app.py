"""The web application: routes, keys, errors, logs, figures."""

import logging
import time
import uuid
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import ptuning
from ptuning.serving import openai_api, rest
from ptuning.serving.answering import Services
from ptuning.serving.auth import KeyCheck
from ptuning.serving.backend import BASE, Backend, Served
from ptuning.serving.body import components
from ptuning.serving.faults import Fault
from ptuning.serving.limits import Prompts
from ptuning.serving.metrics import Metrics
from ptuning.serving.openai_schema import ChatRequest, CompletionRequest, PrefixRequest
from ptuning.serving.options import ServeOptions
from ptuning.serving.rest import RestRequest

log = logging.getLogger("ptuning.serving")


def create_app(backend: Backend, options: ServeOptions, metrics: Metrics) -> FastAPI:
    """The application over a backend that is running.

    Args:
        metrics: the one that the backend reports to.
    """
    prompts = Prompts(backend.tokenizer, backend.context)
    services = Services(backend, prompts, default_model(options, backend.served()))
    backend.find(services.default_model)  # a wrong name is refused now, not with the first request
    metrics.watch("running", "Answers in the running batch", lambda: backend.stats().running)
    metrics.watch("queue", "Answers that wait for a place", lambda: backend.stats().waiting)
    app = FastAPI(title="ptuning", version=ptuning.__version__, docs_url=None, redoc_url=None)
    app.include_router(rest.router(services))
    app.include_router(openai_api.router(services))

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are answered, 503 when the worker has died or the server is stopping."""
        stats = backend.stats()
        state = "worker died" if not stats.alive else "stopping" if stats.draining else "ok"
        content = {"status": state, "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(content, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Fault)
    async def fault(request: Request, error: Fault) -> JSONResponse:
        request.state.error = error.code
        return error.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail.lower()}; the routes are in /openapi.json"
        return Fault(error.status_code, text, "no_such_route", headers=error.headers).response(request.url.path)

    @app.exception_handler(Exception)  # the HTTP server logs its traceback
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return Fault(500, "an error of the server's; its log says more", "internal_error").response(request.url.path)

    _describe(app)
    # The last one added sees a request first.
    app.add_middleware(KeyCheck, api_key=options.api_key, admin_key=options.admin_key)
    if options.cors_origin:
        _allow_origins(app, options.cors_origin)
    app.add_middleware(Journal, metrics=metrics, log_prompts=options.log_prompts)
    return app


def default_model(options: ServeOptions, served: Sequence[Served]) -> str:
    """What answers requests that name no model: --default_model, the only prefix there is at the start, or the base."""
    if options.default_model is not None:
        return options.default_model
    prefixes = [one.name for one in served if not one.is_base]
    return prefixes[0] if len(prefixes) == 1 else BASE


class Journal:
    """One log line and one count a request, also where it is cut off."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log_prompts: bool):
        self.app, self.metrics, self.log_prompts = app, metrics, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, number, status = time.monotonic(), uuid.uuid4().hex[:16], 499  # the client went away before a status
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            status = 500  # its answer is made outside of this
            raise
        finally:
            self._write(scope, state, number, status, time.monotonic() - started)

    def _write(self, scope: Scope, state: dict, number: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # never the path itself, which a client makes up
        model = state.get("model", "")
        self.metrics.request(route, model, status)
        if (code := state.get("error")) is not None:
            self.metrics.error(code)
        if route in ("/health", "/metrics") and status == 200:
            return
        fields = {
            "id": number,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        fields |= {key: state[key] for key in ("model", "error") if key in state}
        if (usage := state.get("usage")) is not None:
            fields |= {"prompt_tokens": usage.prompt, "answer_tokens": usage.answer}
        if self.log_prompts:
            fields |= {key: state[key] for key in ("prompt", "answer") if key in state}
        log.info("request", extra={"fields": fields})


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=[openai_api.DROPPED, "Retry-After", "X-Request-ID"],
    )


def _describe(app: FastAPI) -> None:
    """Adds to the OpenAPI description the bodies, which the routes read themselves, and the statuses."""
    original = app.openapi

    def openapi() -> dict:
        if app.openapi_schema is None:
            schema = original()
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            parts |= components(ChatRequest, CompletionRequest, PrefixRequest, RestRequest)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    answers = operation["responses"]
                    answers.pop("422", None)
                    error = {"description": "{error: {message, type, param, code}}; on REST routes the REST shape"}
                    answers |= {str(code): error for code in (400, 401, 403, 404, 405, 408, 409, 413, 429, 503, 504)}
        return app.openapi_schema

    app.openapi = openapi
