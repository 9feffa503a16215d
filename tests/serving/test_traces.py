"""Spans of requests, at a collector."""

import asyncio
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ptuning.errors import ConfigError
from ptuning.serving.access import AccessLog, Metrics
from ptuning.serving.answering import Usage
from ptuning.serving.options import ServeOptions
from ptuning.serving.traces import Traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector():
    """Its address, and the requests that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


def ask(traces: Traces, status: int, *headers: tuple[bytes, bytes], **state) -> None:
    """A request to an application that answers with this status."""

    async def app(scope, receive, send):
        scope["state"] |= state
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def send(message):
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "headers": list(headers),
        "route": type("Route", (), {"path": "/chatglm"}),
    }
    asyncio.run(AccessLog(app, Metrics(), False, traces)(scope, None, send))


def test_a_span_a_request():
    with collector() as (address, got):
        traces = Traces(f"{address}/")
        ask(
            traces,
            200,
            (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode()),
            (b"x-request-id", b"mine"),
            model="ads",
            usage=Usage(7, 5),
            prompt="a secret",
        )
        ask(traces, 503, error="too_busy")
        traces.close()
    assert {path for path, _ in got} == {"/v1/traces"}
    resources = [each for _, body in got for each in ExportTraceServiceRequest.FromString(body).resource_spans]
    assert b"a secret" not in b"".join(body for _, body in got)
    names = {
        value.value.string_value
        for each in resources
        for value in each.resource.attributes
        if value.key == "service.name"
    }
    assert names == {"ptuning"}
    good, bad = (span for each in resources for scope in each.scope_spans for span in scope.spans)
    assert good.name == bad.name == "POST /chatglm" and good.end_time_unix_nano >= good.start_time_unix_nano
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT) and not bad.parent_span_id
    found = {each.key: each.value.string_value or each.value.int_value for each in good.attributes}
    assert found == {
        "http.request.method": "POST",
        "http.route": "/chatglm",
        "http.response.status_code": 200,
        "gen_ai.response.model": "ads",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "ptuning.request_id": "mine",
    }
    assert (good.status.code, bad.status.code) == (0, 2)
    assert {each.key: each.value.string_value for each in bad.attributes}["error.type"] == "too_busy"


def test_a_collector_that_is_away_holds_nothing_up():
    with collector() as (address, _):
        pass
    traces = Traces(address)
    ask(traces, 200)
    traces.close()


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match=r"--trace_endpoint 127\.0\.0\.1:4318: expected an address such as http://"):
        ServeOptions(trace_endpoint="127.0.0.1:4318")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        Traces("http://127.0.0.1:4318")
    assert str(refused.value) == "--trace_endpoint: opentelemetry.sdk is not installed; pip install 'ptuning[otel]'"
