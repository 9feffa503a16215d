"""What the HTTP side asks of what computes, so that another engine (vLLM) can take the worker's place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ptuning.families import Template
from ptuning.generation import GenerationRequest, Token
from ptuning.serving.errors import ApiError

BASE = "base"  # always names the untuned base, besides its folder's name


@dataclass(frozen=True)
class Served:
    """A model that requests can name.

    Args:
        name: of the prefix, or of the base's folder.
        created: seconds since 1970 when it was saved; of the base, when it was loaded.
        source_prefix: text that it was trained to see in front of every prompt.
        pre_seq_len: length of the prefix; 0 where it has none.
        prefix: what the backend's engine needs to answer with it; nothing for the HTTP side to look at.
        kind: base, or the noun of what was tuned.
    """

    name: str
    created: int
    source_prefix: str = ""
    pre_seq_len: int = 0
    prefix: Any = field(default=None, repr=False)
    kind: str = BASE

    @property
    def is_base(self) -> bool:
        return self.kind == BASE


@dataclass(frozen=True)
class Stats:
    """How busy the backend is.

    Args:
        running: answers computed.
        waiting: answers that wait.
        alive: whether it still answers.
        draining: whether it refuses what is new.
        reserved: share of the cache that running answers hold, 0 to 1.
        kept: tokens of earlier turns whose keys and values are kept.
    """

    running: int
    waiting: int
    alive: bool
    draining: bool
    reserved: float = 0.0
    kept: int = 0


class BackendError(ApiError):
    """Why an answer can't be computed; the subclasses say which HTTP status that is."""

    status, kind, code = 500, "server_error", "internal_error"
    param: str | None = None

    def __init__(self, message: str, headers: dict[str, str] | None = None):
        super().__init__(self.status, message, self.code, self.param, self.kind, headers)


class UnknownModel(BackendError):
    """No model of this name."""

    status, kind, code, param = 404, "invalid_request_error", "model_not_found", "model"


class Busy(BackendError):
    """The queue is full.

    Args:
        retry_after: seconds until a place is likely to be free.
    """

    status, kind, code = 429, "rate_limit_error", "queue_full"

    def __init__(self, message: str, retry_after: int):
        super().__init__(message, {"Retry-After": str(retry_after)})


class Refused(BackendError):
    """This request can't be computed, and others can."""

    status, kind, code = 400, "invalid_request_error", "cannot_generate"


class TooLate(BackendError):
    """The time limit of a request is over."""

    status, kind, code = 504, "timeout_error", "request_timeout"


class Unavailable(BackendError):
    """The worker has died or the server is shutting down."""

    status, kind, code = 503, "server_error", "unavailable"


class NameTaken(BackendError):
    """There is a model of this name already."""

    status, kind, code = 409, "invalid_request_error", "name_taken"


class Answers(Protocol):
    """The answers to some requests, token by token as they are made: `async for index, token in answers`.

    Ends when all have finished. Raises BackendError where one can't be finished.
    """

    def __aiter__(self) -> "Answers": ...

    async def __anext__(self) -> tuple[int, Token]: ...

    def cancel(self, index: int | None = None) -> None:
        """Frees the place of one answer, or of all that haven't finished, before the next step."""


class Backend(Protocol):
    """One base with its prefixes."""

    template: Template
    context: int  # tokens of prompt and answer together
    capacity: int  # answers that can run or wait at a time
    when_down: str  # what /health says while it can't answer

    def start(self) -> None:
        """Comes before anything is submitted."""

    def served(self) -> list[Served]:
        """The base, then the prefixes by name."""

    def find(self, name: str) -> Served:
        """The model of this name.

        Raises:
            UnknownModel: there is none.
        """

    def submit(self, model: str, requests: Sequence[GenerationRequest]) -> Answers:
        """Queues requests, all of them or none. The model says which prefix they get; their ids don't count.

        Raises:
            UnknownModel, Busy, Unavailable.
        """

    async def add_prefix(self, name: str, folder: str) -> Served:
        """Loads a prefix while others are answered.

        Raises:
            NameTaken, Unavailable; Refused: the folder isn't a prefix for this base.
        """

    async def remove_prefix(self, name: str) -> None:
        """New requests no longer find it; those that run finish.

        Raises:
            UnknownModel; Refused: it is the base.
        """

    def stats(self) -> Stats: ...

    def drain(self) -> None:
        """Refuses new requests from now on."""

    def on_death(self, tell: Callable[[], None]) -> None:
        """Has it call `tell`, from any thread, once it can never answer again and all that waited have been told so. What comes
        back by itself never calls it."""

    def wait_idle(self, seconds: float) -> bool:
        """Blocks until nothing runs or waits, or the time is over. Returns whether it is idle."""

    def close(self) -> None:
        """Stops; what still runs gets Unavailable."""
