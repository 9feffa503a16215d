"""The page's client of the API, over openai's: lists the models and streams answers.

Language-free; page_texts words its problems.

The page_* files import one another by bare names: Streamlit puts the folder of its script on sys.path. As
ptuning.serving.* they would load torch (4 s and 300 MB) into a process that holds no model. Of the package they import
only what stands left of torch: errors and language.
"""

import contextlib
import os
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

CONNECT_S = 5.0
READ_S = 600.0  # between two chunks; a long queue on a slow machine is no fault, and the page has a stop button
_BASE = "base"  # kind of an untuned model
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

    def client(self) -> openai.OpenAI:
        """For short requests."""
        http = openai.DefaultHttpxClient(trust_env=self._trust_env)
        return openai.OpenAI(**self._options(CONNECT_S), http_client=http)

    def async_client(self) -> openai.AsyncOpenAI:
        """For answers."""
        http = openai.DefaultAsyncHttpxClient(trust_env=self._trust_env)
        return openai.AsyncOpenAI(**self._options(READ_S), http_client=http)

    @property
    def _trust_env(self) -> bool:
        """A proxy from the environment is not used for an API on this machine."""
        return urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1")

    def _options(self, read: float) -> dict[str, Any]:
        # Whether to try again is for the person in front of the page.
        timeout = openai.Timeout(read, connect=CONNECT_S)
        return {"base_url": f"{self.url}/v1", "api_key": self.key or "none", "timeout": timeout, "max_retries": 0}


@dataclass(frozen=True)
class Model:
    """What can be asked.

    Args:
        name: that requests give.
        saved: seconds since 1970 when its prefix or LoRA was saved; 0 for a base.
    """

    name: str
    saved: int = 0


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


def list_models(api: Api) -> list[Model]:
    """What `model` may be, in the server's order.

    Raises:
        ApiProblem: they can't be had.
    """
    with _readable(api), api.client() as client:
        found = client.models.list().data
        tuned = [getattr(model, "kind", _BASE) != _BASE for model in found]  # other servers don't say so of theirs
        return [Model(str(model.id), model.created if new else 0) for model, new in zip(found, tuned, strict=True)]


async def stream_chat(api: Api, model: str, messages: list[dict], sampling: Sampling) -> AsyncGenerator[Piece, None]:
    """Streams one answer. Closing the iterator or cancelling its task closes the connection, and so frees the server.

    Raises:
        ApiProblem: no answer, or the answer broke off; what came before has been yielded.
    """
    with _readable(api):
        async with api.async_client() as client:
            asked: Any = {"model": model, "messages": messages, **sampling.fields()}
            async with await client.chat.completions.create(stream=True, **asked) as stream:
                headers, finish = stream.response.headers, ""
                if not headers.get("content-type", "").startswith("text/event-stream"):
                    raise ApiProblem("not_the_api", url=api.url)
                dropped = headers.get("x-history-dropped", "")
                if dropped.isdecimal() and int(dropped):
                    yield Piece(dropped=int(dropped))
                async for chunk in stream:
                    if not chunk.choices:  # the last chunk of some servers has only the usage
                        continue
                    choice = chunk.choices[0]
                    text, finish = choice.delta.content or "", choice.finish_reason or finish
                    if text or choice.finish_reason:  # a half of a surrogate pair can't be shown or saved
                        yield Piece(text.encode("utf-8", "replace").decode("utf-8"), choice.finish_reason or "")
                if not finish:
                    raise ApiProblem("cut")


@contextlib.contextmanager
def _readable(api: Api) -> Iterator[None]:
    """Turns what the client raises into an ApiProblem."""
    if not _is_address(api.url):
        raise ApiProblem("bad_url", url=api.url)
    try:
        yield
    except openai.APIStatusError as error:
        raise _refusal(api, error) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__  # by name, because which HTTP library it is differs between openai's versions
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError"):
            raise ApiProblem("unreachable", url=api.url) from None
        if isinstance(error, openai.APITimeoutError):
            raise ApiProblem("timeout", url=api.url) from None
        # "illegal" is the word for bytes that are not HTTP: another program listens there.
        raise ApiProblem("not_the_api" if "illegal" in str(cause) else "cut", url=api.url) from None
    except openai.APIError as error:  # an error event in the stream
        raise ApiProblem("server", detail=_short(error.message)) from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):  # not what the client's types say
        raise ApiProblem("not_the_api", url=api.url) from None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _refusal(api: Api, error: openai.APIStatusError) -> ApiProblem:
    """The problem that an answer with an HTTP error status stands for."""
    status, detail = error.status_code, _detail(error.body)
    if status in (401, 403):
        return ApiProblem("key_wrong" if api.key else "key_missing", detail=detail)
    if status == 429:
        wait = error.response.headers.get("retry-after", "")
        return ApiProblem("busy", seconds=wait, detail=detail) if wait else ApiProblem("busy_soon", detail=detail)
    if not detail and status in (404, 405, 501):
        return ApiProblem("not_the_api", url=api.url)
    kinds = {404: "unknown", 503: "down", 504: "too_long"}
    kind = kinds.get(status, "refused" if status < 500 else "server")
    return ApiProblem(kind, status=status, detail=detail or error.response.reason_phrase)


def _detail(body: object) -> str:
    """The message of an error answer, which openai has taken out of `error`, or what other servers have instead."""
    found = body.get("message") or body.get("detail") if isinstance(body, dict) else None
    return _short(found) if isinstance(found, str) else ""


def _short(text: str) -> str:
    return text if len(text) <= _DETAIL_LIMIT else text[:_DETAIL_LIMIT] + "…"
