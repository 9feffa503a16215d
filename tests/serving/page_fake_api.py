"""A small API for the page's tests: its answers come when the test says so, and it notices a client that goes away."""

import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WAIT_S = 20.0  # far more than any test needs; a test that is wrong fails then, instead of hanging


class FakeApi:
    """Serves /v1/models and streamed /v1/chat/completions on a free port of 127.0.0.1; a context manager.

    Attributes:
        models: what /v1/models lists. Chat with another name is a 404.
        saved: when a model that is no base was saved.
        listed: how often /v1/models was asked for.
        answers: the chunks of each model's answer; by default one chunk with the model's name and the question.
        refusal: (status, body, headers) for every chat request, or None.
        key: the key that is wanted, or "".
        headers: further headers of an answer.
        finish: the finish_reason of an answer.
        requests: the bodies of the chat requests.
        hung_up: set when a client closed its connection before the end of an answer.
    """

    def __init__(self):
        self.reset()
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeApi":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Back to the first state; running answers are not touched."""
        self.models = ["chatglm2-6b", "adgen", "faq"]
        self.saved: dict[str, int] = {}
        self.listed = 0
        self.answers: dict[str, list[str]] = {}
        self.refusal: tuple[int, dict | str, dict[str, str]] | None = None
        self.key = ""
        self.headers: dict[str, str] = {}
        self.finish = "stop"
        self.broken = False  # end the answers without finish_reason and [DONE]
        self.requests: list[dict] = []
        self.hung_up = threading.Event()
        self._gates: dict[str, threading.Semaphore] = {}

    def hold(self, model: str) -> None:
        """Lets no chunk of the model's answers out until `release`."""
        self._gates[model] = threading.Semaphore(0)

    def release(self, model: str, chunks: int = 1) -> None:
        """Lets so many chunks out."""
        for _ in range(chunks):
            self._gates[model].release()


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi

    def do_GET(self) -> None:
        if self._has_key():
            self.api.listed += 1
            data = [{"id": name} | self._about(name) for name in self.api.models]
            self._json(200, {"object": "list", "data": data})

    def _about(self, name: str) -> dict:
        when = self.api.saved.get(name)
        return {"kind": "base", "created": 1_800_000_000} if when is None else {"kind": "prefix", "created": when}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        api = self.api
        api.requests.append(body)
        if api.refusal:
            self._json(*api.refusal)
        elif body["model"] not in api.models:
            names = ", ".join(api.models)
            self._json(404, {"error": {"message": f"no model {body['model']!r}; there are {names}"}})
        else:
            self._stream(body)

    def _stream(self, body: dict) -> None:
        api, model = self.api, body["model"]
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream; charset=utf-8", **api.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        gate = api._gates.get(model)
        for chunk in api.answers.get(model, [f"{model}: {body['messages'][-1]['content']}"]):
            for _ in range(int(WAIT_S / 0.02)):
                if gate is None or gate.acquire(timeout=0.02):
                    break
                if self._client_left():
                    api.hung_up.set()
                    return
            self._event({"choices": [{"delta": {"content": chunk}, "finish_reason": None}]})
        if not api.broken:
            self._event({"choices": [{"delta": {}, "finish_reason": api.finish}]})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict) -> None:
        self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _client_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _has_key(self) -> bool:
        if not self.api.key or self.headers["Authorization"] == f"Bearer {self.api.key}":
            return True
        self._json(401, {"error": {"message": "this API needs its key"}})
        return False

    def _json(self, status: int, body: dict | str, headers: dict[str, str] | None = None) -> None:
        payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(body, str) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(payload)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_) -> None:
        pass
