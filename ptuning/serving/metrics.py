"""Figures for Prometheus, in a registry of their own so that several servers can live in one process."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
