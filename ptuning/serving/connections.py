"""Connections that bring nothing must cost nothing: time for a request's head, a limit of connections, answers that nobody reads.

uvicorn's own protocol waits for a head for ever and accepts connections until the process has no files left; from then on
/health is unreachable and every accept fails anew. Here a new connection always finds a place as long as others only wait.
"""

import asyncio
import json
import logging
import sys
from http import HTTPStatus
from typing import Any

import uvicorn
from httptools import HttpParserCallbackError, HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ptuning.serving.errors import ApiError

log = logging.getLogger("ptuning.serving.connections")

HEAD_SECONDS = 10.0  # for a request's head, from its first byte or from the connection's beginning
HEAD_LIMIT = 1 << 16  # bytes of a request's head
UNREAD_SECONDS = 60.0  # that a client may leave an answer unread, once the buffers are full
BACKLOG = 128  # connections that the system keeps while the process is busy
MOST_FILES = 65536
_FILES_BESIDE = 96  # files of the process that aren't connections: the model's, libraries, log, event loop
_FIRST_PROBE = 0.05  # seconds


class HttpConfig(uvicorn.Config):
    """uvicorn's, with this module's protocol.

    Args:
        app: what answers.
        max_connections: that are open at a time; fewer where the process may not have so many files.
        **more: further arguments of uvicorn.Config.
    """

    def __init__(self, app: Any, max_connections: int, **more: Any):
        super().__init__(app, http=Connection, ws="none", backlog=BACKLOG, log_config=None, access_log=False, **more)
        self.max_connections = max(min(max_connections, raise_file_limit() - _FILES_BESIDE), 8)


def raise_file_limit() -> int:
    """Raises the soft limit of open files to the hard one, MOST_FILES at most. Returns what holds."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS has a lower one that it doesn't tell
            wanted = soft
        return wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with limits of time and number. `waits_since` says since when it waits for (the rest of) a request;
    None while an answer is made."""

    config: HttpConfig

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.head_due: asyncio.TimerHandle | None = None
        self.unread_due: asyncio.TimerHandle | None = None
        self.probe_due: asyncio.TimerHandle | None = None
        self.waits_since: float | None = self.loop.time()
        self.head_bytes = 0  # of a head that isn't complete yet
        self.refusal: ApiError | None = None  # of what the parser reads at the moment
        self._expect_head()
        if len(self.connections) > self.config.max_connections:
            self._make_room()

    def connection_lost(self, exc) -> None:
        for timer in (self.head_due, self.unread_due, self.probe_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # --- waiting for a request ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        in_head = self.head_due is not None
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.waits_since is not None and self.head_due is None and not self._reads_body():
            self._expect_head()  # a further request on the connection has begun
        if self.head_due is None:
            self.head_bytes = 0
        elif in_head:
            self.head_bytes += len(data)  # the parser tells of a header only when it has all of it
            if self.head_bytes > HEAD_LIMIT:
                self._refuse(_head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.refusal = None

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_LIMIT:
            self.refusal = _head_too_large()
            raise ValueError(self.refusal.code)  # the parser stops, and data_received has the refusal sent
        if self.head_due is not None:
            self.head_due.cancel()
            self.head_due = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle is not None and not self.cycle.response_complete:
            self.waits_since = None

    def on_response_complete(self) -> None:
        more = bool(self.pipeline)
        super().on_response_complete()
        if not more:
            self.waits_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the parser stops: at a head that was refused, or at what isn't HTTP. Its reason helps: it
        also stops at Content-Length together with Transfer-Encoding, of which what lies between may have read the other."""
        error = sys.exception()
        reason = (
            f": {error}"
            if isinstance(error, HttpParserError) and not isinstance(error, HttpParserCallbackError)
            else ""
        )
        self._refuse(self.refusal or ApiError(400, f"no request of HTTP/1.1 that can be read{reason}", "invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answers with an error, outside of the application, and closes the connection."""
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
        } | error.headers
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _reads_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self.head_due = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _make_room(self) -> None:
        """Closes the connection that has waited longest; this one where all others are being answered."""
        others = [each for each in self.connections if isinstance(each, Connection) and each is not self]
        waiting = [(each.waits_since, id(each), each) for each in others if each.waits_since is not None]
        log.warning(
            "too many connections",
            extra={"fields": {"limit": self.config.max_connections, "waiting": len(waiting)}},
        )
        if waiting:
            oldest = min(waiting)[2]
            self.connections.discard(oldest)
            oldest.transport.abort()
            return
        text = f"too many connections: all {self.config.max_connections} are being answered (--max_connections); ask again later"
        self._refuse(ApiError(503, text, "too_many_connections", headers={"retry-after": "1"}))

    # --- an answer's way out --------------------------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's always closes
        """A client that has sent all that it will send still gets its answer.

        Whether it has gone altogether looks the same from here. An interim answer, which clients pass over, tells: what sends
        to a closed connection is told so. HTTP/1.0 has none (nginx speaks it by default), and neither has an answer that has
        begun: there, to close is to go away.

        Returns:
            Whether the connection stays open for writing.
        """
        cycle = self.cycle
        answering = cycle is not None and not (cycle.more_body or cycle.response_complete)
        answering = answering and not cycle.response_started and cycle.scope["http_version"] != "1.0"
        if answering:
            self.cycle.keep_alive = False
            self._probe(_FIRST_PROBE)
        return answering

    def _probe(self, seconds: float) -> None:
        cycle = self.cycle
        if cycle.response_started or self.transport.is_closing():
            return
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.probe_due = self.loop.call_later(seconds, self._probe, min(seconds * 2, 5.0))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread_due = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread_due is not None:
            self.unread_due.cancel()
            self.unread_due = None


def _head_too_large() -> ApiError:
    return ApiError(
        431,
        f"the head of the request has more than {HEAD_LIMIT} bytes; send fewer or shorter headers",
        "head_too_large",
    )
