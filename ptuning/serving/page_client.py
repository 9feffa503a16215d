"""The page's client of the API: lists the models, and streams answers in threads that a page can redraw from and stop.

Language-free; page_texts words its problems.

The page_* files import one another by bare names: Streamlit puts the folder of its script on sys.path. As
ptuning.serving.* they would load torch (4 s and 300 MB) into a process that holds no model. Of the package they import
only what stands left of torch: errors and language.
"""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass

import httpx

CONNECT_S = 5.0
READ_S = 600.0  # between two chunks; a long queue on a slow machine is no fault, and the page has a stop button
_DETAIL_LIMIT = 600  # characters of a server's message that are shown


class ApiProblem(Exception):
    """What went wrong, for page_texts to say in words.

    Args:
        kind: the part after "problem_" in page_texts.
        fields: values for that text.
    """

    def __init__(self, kind: str, **fields: object):
        super().__init__(f"{kind} {fields}")
        self.kind = kind
        self.fields = fields


@dataclass(frozen=True)
class Api:
    """Where the API is and the key it wants, if any."""

    url: str = "http://127.0.0.1:7030"
    key: str = ""

    @classmethod
    def from_environment(cls) -> "Api":
        """PTUNING_API and PTUNING_API_KEY; a base URL that ends in /v1, as OpenAI clients want it, is fine too."""
        url = os.environ.get("PTUNING_API", "").strip() or cls.url
        return cls(url.rstrip("/").removesuffix("/v1"), os.environ.get("PTUNING_API_KEY", "").strip())

    def client_options(self) -> dict:
        """For httpx.Client and AsyncClient. A proxy from the environment is not used for an API on this machine."""
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        return {
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": httpx.Timeout(CONNECT_S, read=READ_S),
            "trust_env": not local,
        }


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; temperature 0 is greedy, a seed of None is random."""

    temperature: float = 0.8
    top_p: float = 0.8
    max_tokens: int = 512
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def fields(self) -> dict[str, float | int]:
        """The request's fields. What is at its neutral value is left out, so that the server's own default holds."""
        fields = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        if self.seed is not None:
            fields["seed"] = self.seed
        penalties = {"frequency_penalty": self.frequency_penalty, "presence_penalty": self.presence_penalty}
        return fields | {name: value for name, value in penalties.items() if value}


@dataclass(frozen=True)
class Piece:
    """A part of an answer: new text, the reason why it ended (in its last piece), old turns that the server dropped."""

    text: str = ""
    finish: str = ""
    dropped: int = 0


def list_models(api: Api) -> list[str]:
    """The names that `model` may have, in the server's order.

    Raises:
        ApiProblem: they can't be had.
    """
    with _readable(api), httpx.Client(**api.client_options()) as client:
        answer = client.get(f"{api.url}/v1/models", timeout=CONNECT_S)
        if answer.is_error:
            raise _refusal(api, answer)
        try:
            return [str(model["id"]) for model in answer.json()["data"]]
        except (ValueError, TypeError, KeyError):
            raise ApiProblem("not_the_api", url=api.url) from None


async def stream_chat(api: Api, model: str, messages: list[dict], sampling: Sampling) -> AsyncGenerator[Piece, None]:
    """Streams one answer. Closing the iterator or cancelling its task closes the connection, and so frees the server.

    Raises:
        ApiProblem: no answer, or the answer broke off; what came before has been yielded.
    """
    body = {"model": model, "messages": messages, "stream": True, **sampling.fields()}
    url = f"{api.url}/v1/chat/completions"
    with _readable(api):
        async with httpx.AsyncClient(**api.client_options()) as client, client.stream("POST", url, json=body) as answer:
            async for piece in _pieces(api, answer):
                yield piece


class Job:
    """Streams an answer from the moment it is made. The attributes may be read at any time.

    It lives in the session's state, not in a script run: Streamlit ends a run whenever a widget is touched, and the
    next run goes on showing the same job. The thread has an asyncio task, because a task can be cancelled while it
    waits for the server's first byte; a blocking read can't.

    Attributes:
        model: the model asked.
        text: what came so far.
        finish: the server's reason for the end, "" before it.
        dropped: old turns that the server left out.
        problem: what went wrong, or None.
        stopped: whether stop() ended it.
        done: whether nothing more comes.
    """

    def __init__(self, api: Api, model: str, messages: list[dict], sampling: Sampling, changed: threading.Event):
        """
        Args:
            changed: set at every change; shared by the jobs that one page waits for.
        """
        self.model = model
        self.text = ""
        self.finish = ""
        self.dropped = 0
        self.problem: ApiProblem | None = None
        self.stopped = False
        self.done = False
        self._changed = changed
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        stream = self._stream(api, messages, sampling)
        self._thread = threading.Thread(target=self._run, args=(stream,), name=f"answer of {model}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Closes the connection, at whatever stage. What came so far stays. Does not wait."""
        with self._lock:
            if self.done:
                return
            self.stopped = True
            if self._loop is not None and self._task is not None:
                with contextlib.suppress(RuntimeError):  # the loop closed just now, the answer is complete
                    self._loop.call_soon_threadsafe(self._task.cancel)

    def join(self, timeout: float) -> None:
        """Waits until the connection is closed."""
        self._thread.join(timeout)

    def _run(self, stream) -> None:
        try:
            # A stop before the task runs has cancelled nothing; _stream looks at the flag itself.
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(stream)
        finally:
            with self._lock:
                self.done = True
                self._loop = None
            self._changed.set()

    async def _stream(self, api: Api, messages: list[dict], sampling: Sampling) -> None:
        with self._lock:
            if self.stopped:
                return
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            async with contextlib.aclosing(stream_chat(api, self.model, messages, sampling)) as pieces:
                async for piece in pieces:
                    self.text += piece.text
                    self.finish = piece.finish or self.finish
                    self.dropped = piece.dropped or self.dropped
                    self._changed.set()
        except ApiProblem as problem:
            self.problem = problem
        except Exception as error:  # a fault of this program must end as a message on the page, not as a wait for ever
            self.problem = ApiProblem("page", detail=f"{type(error).__name__}: {error}")


async def _pieces(api: Api, answer: httpx.Response) -> AsyncIterator[Piece]:
    if answer.is_error:
        await answer.aread()
        raise _refusal(api, answer)
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        raise ApiProblem("not_the_api", url=api.url)
    dropped = answer.headers.get("x-history-dropped", "")
    if dropped.isdecimal() and int(dropped):
        yield Piece(dropped=int(dropped))
    async for data in _events(answer):
        if data.strip() == "[DONE]":
            return
        piece = _piece(api, data)
        if piece.text or piece.finish:
            yield piece
    raise ApiProblem("cut")


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event. Lines are split here: httpx's aiter_lines also splits at U+2028 and the like,
    which may stand in the JSON text."""
    rest, data = b"", []
    async for chunk in answer.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode("utf-8", "replace")
                data = []


def _piece(api: Api, data: str) -> Piece:
    try:
        event = json.loads(data)
        if event.get("error"):
            raise ApiProblem("server", detail=_detail(event))
        if not event["choices"]:  # the last chunk of some servers has only the usage
            return Piece()
        choice = event["choices"][0]
        text = (choice.get("delta") or {}).get("content") or ""
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ApiProblem("not_the_api", url=api.url) from None
    # A half of a surrogate pair can't be shown or saved.
    return Piece(text.encode("utf-8", "replace").decode("utf-8"), choice.get("finish_reason") or "")


@contextlib.contextmanager
def _readable(api: Api) -> Iterator[None]:
    """Turns what httpx raises into an ApiProblem."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise ApiProblem("bad_url", url=api.url) from None
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError):
        raise ApiProblem("unreachable", url=api.url) from None
    except httpx.TimeoutException:
        raise ApiProblem("timeout", url=api.url) from None
    except httpx.RemoteProtocolError as error:
        # "illegal" is httpcore's word for bytes that are not HTTP: another program listens there.
        raise ApiProblem("not_the_api" if "illegal" in str(error) else "cut", url=api.url) from None
    except httpx.HTTPError:
        raise ApiProblem("cut", url=api.url) from None


def _refusal(api: Api, answer: httpx.Response) -> ApiProblem:
    """The problem that an answer with an HTTP error status stands for."""
    try:
        detail = _detail(answer.json())
    except ValueError:
        detail = ""
    status = answer.status_code
    if status in (401, 403):
        return ApiProblem("key_wrong" if api.key else "key_missing", detail=detail)
    if status == 429:
        wait = answer.headers.get("retry-after", "")
        return ApiProblem("busy", seconds=wait, detail=detail) if wait else ApiProblem("busy_soon", detail=detail)
    if not detail and status in (404, 405, 501):
        return ApiProblem("not_the_api", url=api.url)
    kinds = {404: "unknown", 503: "down", 504: "too_long"}
    kind = kinds.get(status, "refused" if status < 500 else "server")
    return ApiProblem(kind, status=status, detail=detail or answer.reason_phrase)


def _detail(body: object) -> str:
    """The message of an error answer, in OpenAI's shape or in the one of other servers."""
    found = body.get("error") or body.get("detail") if isinstance(body, dict) else None
    if isinstance(found, dict):
        found = found.get("message")
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False) if found else ""
    return text if len(text) <= _DETAIL_LIMIT else text[:_DETAIL_LIMIT] + "…"
