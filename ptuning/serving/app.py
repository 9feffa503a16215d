"""The web application: routes, keys, errors, logs, figures."""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import ptuning
from ptuning.serving import openai_api, rest, token_api
from ptuning.serving.access import AccessLog, Metrics
from ptuning.serving.answering import DROPPED, Services
from ptuning.serving.backend import BASE, Backend, Served
from ptuning.serving.bodies import components, error_response, rest_routes, with_id
from ptuning.serving.doors import Door
from ptuning.serving.errors import ApiError
from ptuning.serving.keys import KeyCheck
from ptuning.serving.openai_schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    PrefixRequest,
    TokenizeRequest,
)
from ptuning.serving.options import ServeOptions
from ptuning.serving.prompts import PromptBuilder
from ptuning.serving.rest import RestRequest
from ptuning.serving.traces import Traces

_ERRORS = (400, 401, 403, 404, 405, 408, 409, 413, 429, 431, 503, 504)  # statuses that any route may have


def create_app(backend: Backend, options: ServeOptions, metrics: Metrics, traces: Traces | None = None) -> FastAPI:
    """The application over a backend that is running.

    Args:
        metrics: the one that the backend reports to.
        traces: where spans go; the caller closes it.
    """
    prompts = PromptBuilder(backend.template, backend.context)
    services = Services(backend, prompts, default_model(options, backend.served()))
    backend.find(services.default_model)  # a wrong name is refused now, not with the first request
    metrics.watch("running", "Answers in the running batch", lambda: backend.stats().running)
    metrics.watch("queue", "Answers that wait for a place", lambda: backend.stats().waiting)
    rest_paths = rest_routes(backend.template)
    metrics.watch("cache_use", "Share of the cache that running answers use", lambda: backend.stats().reserved)
    metrics.watch("cached_tokens", "Tokens of earlier turns that are kept", lambda: backend.stats().kept)
    app = FastAPI(title="ptuning", version=ptuning.__version__, docs_url=None, redoc_url=None)
    app.include_router(rest.router(services))
    app.include_router(openai_api.router(services))
    app.include_router(token_api.router(services))

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are answered, 503 when nothing can compute answers, a step doesn't end or the server is stopping."""
        stats = backend.stats()
        state = "stopping" if stats.draining else "stuck" if stats.stuck else "ok"
        state = state if stats.alive else backend.when_down
        content = {"status": state, "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(content, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        request.state.error = error.code
        return error_response(with_id(error, request), request.url.path, rest_paths)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path if len(request.url.path) <= 80 else request.url.path[:79] + "…"
        text = f"{request.method} {path}: {error.detail.lower()}; the routes are in /openapi.json"
        if error.status_code == 404:  # perhaps a client of another model's server
            text += f"; this server's model answers POST {rest_paths[-1]}"
        problem = ApiError(error.status_code, text, "no_such_route", headers=error.headers)
        return error_response(problem, request.url.path, rest_paths)

    @app.exception_handler(Exception)  # the HTTP server logs its traceback
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        problem = ApiError(500, "an error of the server's; its log says more", "internal_error")
        return error_response(with_id(problem, request), request.url.path, rest_paths)

    _describe(app)
    # The last one added sees a request first.
    app.add_middleware(KeyCheck, keys=options.keys, admin_key=options.admin_key, rest=rest_paths)
    if options.cors_origin:
        _allow_origins(app, options.cors_origin)
    app.add_middleware(
        Door, host=options.host, allowed_hosts=options.allowed_host, origins=options.cors_origin, rest=rest_paths
    )
    app.add_middleware(AccessLog, metrics=metrics, log_prompts=options.log_prompts, traces=traces)
    return app


def default_model(options: ServeOptions, served: Sequence[Served]) -> str:
    """What answers requests that name no model: --default_model, the only prefix there is at the start, or the base."""
    if options.default_model is not None:
        return options.default_model
    prefixes = [one.name for one in served if not one.is_base]
    return prefixes[0] if len(prefixes) == 1 else BASE


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_private_network=True,  # a browser asks before a page of the internet may reach this machine or its network
        allow_headers=["*"],  # clients have headers of their own: the openai JavaScript SDK a dozen x-stainless-…
        expose_headers=[DROPPED, "X-Model", "Retry-After", "X-Request-ID"],
    )


def _describe(app: FastAPI) -> None:
    """Adds to the OpenAPI description the bodies, which the routes read themselves, and the statuses."""
    original = app.openapi

    def openapi() -> dict:
        schema = app.openapi_schema
        if schema is None:
            schema = original()
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            parts |= components(
                ChatRequest, CompletionRequest, PrefixRequest, RestRequest, TokenizeRequest, DetokenizeRequest
            )
            for operations in schema["paths"].values():
                for operation in operations.values():
                    answers = operation["responses"]
                    answers.pop("422", None)
                    error = {
                        "description": "{error: {message, type, param, code}}; on REST routes the REST shape",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    }
                    answers |= {str(code): error for code in _ERRORS}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
