"""Around every request: keys, checked before a body is read, and what is written down of it: log lines and figures.

Log lines are JSON objects, without prompts and answers unless asked for. Figures are in a registry of their own, so that
several servers can live in one process.
"""

import hmac
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning.serving.bodies import error_response
from ptuning.serving.errors import ApiError

log = logging.getLogger("ptuning.serving")

OPEN = ("/health",)  # for load balancers; it says nothing about requests
ADMIN = "/v1/prefixes"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class KeyCheck:
    """Lets through what carries the right key, compared in constant time.

    Every route but /health needs `api_key` where there is one, /metrics too. Adding and removing prefixes needs `admin_key`,
    and isn't possible without one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, admin_key: str | None, rest: tuple[str, ...]):
        self.app, self.api_key, self.admin_key, self.rest = app, api_key, admin_key, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Request(scope))) is not None:
            await error_response(error, scope["path"], self.rest)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        path = request.scope["path"]
        if path in OPEN:
            return None
        needed = self.api_key
        if path == ADMIN or path.startswith(ADMIN + "/"):
            needed = self.admin_key
            if needed is None:
                return ApiError(
                    403, "prefixes can't be changed: the server was started without --admin_key", "no_admin_key"
                )
        if needed is None or _same(_given(request), needed):
            return None
        return ApiError(
            401,
            f"wrong or missing {'admin' if needed is self.admin_key else 'API'} key; send it as `Authorization: Bearer KEY`",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Metrics:
    """What /metrics shows. Label `model` is a served name, never text that a client made up."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ptuning_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"ptuning_{name}", text, ["model"], buckets=_SECONDS, registry=self.registry)

        self._requests = counter("requests", "HTTP requests", "route", "model", "status")
        self._errors = counter("errors", "Requests that failed, by the error's code", "code")
        self._tokens = counter("tokens", "Tokens of prompts and of answers", "model", "kind")
        self._first = histogram("first_token_seconds", "From the request to its first token, waiting included")
        self._between = histogram("between_tokens_seconds", "Between two tokens of an answer")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when /metrics is."""
        Gauge(f"ptuning_{name}", text, registry=self.registry).set_function(value)

    def request(self, route: str, model: str, status: int) -> None:
        self._requests.labels(route, model, str(status)).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def prompt_tokens(self, model: str, count: int) -> None:
        self._tokens.labels(model, "prompt").inc(count)

    def token(self, model: str, seconds: float, first: bool) -> None:
        """One token of an answer.

        Args:
            seconds: since the answer's previous token, or since the request.
        """
        (self._first if first else self._between).labels(model).observe(seconds)
        self._tokens.labels(model, "answer").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class AccessLog:
    """One log line and one count a request, also where it is cut off."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log_prompts: bool):
        self.app, self.metrics, self.log_prompts = app, metrics, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, number, status = time.monotonic(), uuid.uuid4().hex[:16], 499  # the client went away before a status
        state = scope.setdefault("state", {})

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, with_id)
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


class JsonLines(logging.Formatter):
    """{"time", "level", "message", …} with the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logs() -> None:
    """Sends this package's and the HTTP server's logs to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("ptuning.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)


def _given(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, needed: str) -> bool:
    return hmac.compare_digest(given.encode(), needed.encode())
