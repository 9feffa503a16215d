"""OpenTelemetry: a span of each request, for those who collect them from all of their programs."""

import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from ptuning.packages import require

_SECONDS = 2.0  # that a collector may take; one that is away must not hold up the end

# Fields of the access log → OpenTelemetry's names. Prompts and answers are for the log alone.
_NAMES = {
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "answer_tokens": "gen_ai.usage.output_tokens",
    "error": "error.type",
    "id": "ptuning.request_id",
    "key": "ptuning.key",
}


class Traces:
    """Sends spans to a collector (OTLP over HTTP), in batches and beside the answers. One that is away is a line in the log.

    Args:
        endpoint: such as http://127.0.0.1:4318.

    Raises:
        ConfigError: the packages aren't installed.
    """

    def __init__(self, endpoint: str):
        require("--trace_endpoint", "opentelemetry.sdk", "ptuning[otel]")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_SECONDS)
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say otherwise.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ptuning"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ptuning.serving")

    def record(self, scope: Scope, fields: Mapping[str, Any], seconds: float) -> None:
        """A request that has ended now, as a child of the client's span where its `traceparent` names one.

        Args:
            fields: of its line in the access log.
            seconds: that it took.
        """
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        ended = time.time_ns()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            f"{fields['method']} {fields['route']}",
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={_NAMES[name]: value for name, value in fields.items() if name in _NAMES},
            start_time=ended - int(seconds * 1e9),
        )
        if fields["status"] >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(ended)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
