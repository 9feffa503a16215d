"""What is written down of every request: a log line and figures.

Log lines have no prompts and answers unless asked for. Figures are in a registry of their own, so that several servers can
live in one process.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptuning.serving.traces import Traces

log = logging.getLogger("ptuning.serving")

_ID = re.compile(rb"[\w.:/+=-]{1,128}")  # what of a client's X-Request-ID may stand in a log
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


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
        self._hits = counter("prefix_cache_hits", "Answers whose prompt begins like one before it", "model")
        self._reused = counter("prefix_cache_tokens", "Tokens of prompts that weren't computed again", "model")
        self._set_back = counter("set_back", "Running answers that went back into the queue for lack of room")
        self._first = histogram("first_token_seconds", "From the request to its first token, waiting included")
        self._between = histogram("between_tokens_seconds", "Between two tokens of an answer")
        self._queued = histogram("queue_seconds", "From the request to the step in which its prompt is computed")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when /metrics is."""
        Gauge(f"ptuning_{name}", text, registry=self.registry).set_function(value)

    def request(self, route: str, model: str, status: int) -> None:
        self._requests.labels(route, model, str(status)).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def prompt_tokens(self, model: str, count: int) -> None:
        self._tokens.labels(model, "prompt").inc(count)

    def queued(self, model: str, seconds: float) -> None:
        """An answer has found its place."""
        self._queued.labels(model).observe(seconds)

    def reused(self, model: str, tokens: int) -> None:
        """So many of a prompt's tokens weren't computed, because keys and values of the same beginning were there."""
        self._hits.labels(model).inc()
        self._reused.labels(model).inc(tokens)

    def set_back(self, count: int) -> None:
        """Running answers went back into the queue."""
        self._set_back.inc(count)

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
    """One log line and one count a request, also where it is cut off; and one span where they are collected."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log_prompts: bool, traces: Traces | None = None):
        self.app, self.metrics, self.log_prompts, self.traces = app, metrics, log_prompts, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, number, status = time.monotonic(), _number(scope), 499  # the client went away before a status
        state = scope.setdefault("state", {})
        state["id"] = number

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", number.encode())]
                if "model" in state:
                    headers.append((b"x-model", quote(state["model"]).encode()))  # a name may be Chinese
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        except Exception:
            status = 500  # its answer is made outside of this
            raise
        finally:
            self._write(scope, state, number, status, time.monotonic() - started)

    def _write(self, scope: Scope, state: dict, number: str, status: int, seconds: float) -> None:
        # A stream that was cut off has sent its 200 long before.
        status = state.get("cut", status)
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
        fields |= {key: state[key] for key in ("key", "model", "error") if key in state}
        if (usage := state.get("usage")) is not None:
            fields |= {"prompt_tokens": usage.prompt, "answer_tokens": usage.answer}
        if self.traces is not None:
            self.traces.record(scope, fields, seconds)
        if self.log_prompts:
            fields |= {key: state[key] for key in ("prompt", "answer") if key in state}
        log.info("request", extra={"fields": fields})


def _number(scope: Scope) -> str:
    """The id of a request: the one that a client or a proxy gave it, so that its log lines and ours can be laid side by side."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode("ascii") if given.isascii() and _ID.fullmatch(given) else uuid.uuid4().hex[:16]
