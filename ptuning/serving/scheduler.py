"""What the worker's thread does with answers (begin, step, expire, drop), and their way back into the event loop that asked."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from ptuning.errors import GenerationError
from ptuning.generation import Engine, GenerationRequest, Token
from ptuning.methods import Companion
from ptuning.serving.access import Metrics
from ptuning.serving.backend import BackendError, Refused, Served, TooLate

log = logging.getLogger("ptuning.serving")


class AnswerStream:
    """The answers to one HTTP request. Made and read in an event loop, filled by the worker.

    Args:
        model: that answers.
        requests: what is asked, one answer each.
        drop: tells the worker that some of the answers are no longer wanted.
    """

    def __init__(
        self, model: Served, requests: Sequence[GenerationRequest], drop: Callable[["AnswerStream", set[int]], None]
    ):
        self.model, self.requests, self.drop = model, requests, drop
        self.submitted = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Token] | BackendError] = asyncio.Queue()
        self.open = set(range(len(requests)))

    def __aiter__(self) -> "AnswerStream":
        return self

    async def __anext__(self) -> tuple[int, Token]:
        while self.open:
            event = await self.events.get()
            if isinstance(event, BackendError):
                self.cancel()
                raise event
            index, token = event
            if index not in self.open:
                continue  # made before its cancellation arrived
            if token.finish is not None:
                self.open.discard(index)
            return index, token
        raise StopAsyncIteration

    def cancel(self, index: int | None = None) -> None:
        gone = self.open.copy() if index is None else self.open & {index}
        self.open -= gone
        if gone:
            self.drop(self, gone)


def deliver(events: dict[AnswerStream, list]) -> None:
    """Hands events to their streams: one wake-up a loop and step, however many answers there are."""
    loops: dict[asyncio.AbstractEventLoop, list] = {}
    for stream, items in events.items():
        loops.setdefault(stream.loop, []).append((stream, items))
    for loop, streams in loops.items():
        call(loop, _hand_out, streams)


def _hand_out(streams: list[tuple[AnswerStream, list]]) -> None:
    for stream, items in streams:
        for item in items:
            stream.events.put_nowait(item)


def call(loop: asyncio.AbstractEventLoop, function: Callable, *args) -> None:
    """Has a function called in an event loop, from any thread."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed, so nothing waits there
        log.debug("an event loop went away before its answer came")


@dataclass(eq=False)
class _Answer:
    """One that the engine has."""

    stream: AnswerStream
    index: int
    latest: float  # when its latest token came, at first when it was submitted
    tokens: int = 0
    placed: bool = False  # whether the engine has begun with it

    @property
    def prefix(self) -> Companion | None:
        return self.stream.model.prefix


class Scheduler:
    """The answers that run or wait in the engine. For the worker's thread alone.

    Args:
        engine: entered before anything else.
        timeout: seconds that a request may take, waiting included.
        metrics: is told of tokens.
        ended: is called with the seconds that an answer took, whatever ended it.
    """

    def __init__(self, engine: Engine, timeout: float, metrics: Metrics, ended: Callable[[float], None]):
        self.engine, self.timeout, self.metrics, self.ended = engine, timeout, metrics, ended
        self._answers: dict[Hashable, _Answer] = {}
        self._numbers = itertools.count()
        self._retired: set[Companion] = set()
        self._set_back = 0  # rows that went back into the queue so far

    def begin(self, stream: AnswerStream) -> None:
        """Queues what is asked."""
        for index, request in enumerate(stream.requests):
            number, prefix = next(self._numbers), stream.model.prefix
            self._answers[number] = _Answer(stream, index, stream.submitted)
            try:
                self.engine.add(replace(request, id=number, prefix=prefix))
            except ValueError as error:
                self._refuse(number, Refused(str(error)))
        self.metrics.prompt_tokens(stream.model.name, sum(len(request.ids) for request in stream.requests))

    def step(self) -> None:
        """One step of the engine; its tokens go where they are waited for."""
        began = time.monotonic()
        try:
            tokens = self.engine.step()
        except GenerationError as error:
            self._refuse(error.request, Refused(str(error)))
            return
        now = time.monotonic()
        for number in {*(row.request.id for row in self.engine.rows), *(token.id for token in tokens)}:
            if not (answer := self._answers[number]).placed:
                answer.placed = True
                self.metrics.queued(answer.stream.model.name, began - answer.stream.submitted)
        self.metrics.set_back(self.engine.set_back - self._set_back)
        self._set_back = self.engine.set_back
        events: dict[AnswerStream, list] = {}
        for token in tokens:
            answer = self._answers[token.id]
            events.setdefault(answer.stream, []).append((answer.index, token))
            if token.reused:
                self.metrics.reused(answer.stream.model.name, token.reused)
            if token.token is not None:
                self.metrics.token(answer.stream.model.name, now - answer.latest, first=not answer.tokens)
                answer.tokens, answer.latest = answer.tokens + 1, now
            if token.finish is not None:
                self._end(token.id)
        deliver(events)

    def expire(self) -> None:
        """Ends what has taken too long."""
        for number, _ in self._late():
            self.engine.cancel(number)
            self._refuse(number, self._too_late())

    def tell_late(self) -> None:
        """Tells those whose time is over, from any thread, while a step doesn't end; their places are freed when it does."""
        deliver({answer.stream: [self._too_late()] for _, answer in self._late()})

    def _late(self) -> list[tuple[Hashable, _Answer]]:
        now = time.monotonic()
        return [each for each in list(self._answers.items()) if now - each[1].stream.submitted > self.timeout]

    def _too_late(self) -> TooLate:
        return TooLate(f"not finished within {self.timeout:g} s (--request_timeout); ask for fewer tokens, or later")

    def drop(self, stream: AnswerStream, indices: set[int]) -> None:
        """Takes out answers that are no longer wanted."""
        for number, answer in list(self._answers.items()):
            if answer.stream is stream and answer.index in indices:
                self.engine.cancel(number)
                self._end(number)

    def retire(self, prefix: Companion) -> None:
        """Forgets the dialogues of a removed prefix, at the latest when its last answer is done."""
        if any(answer.prefix is prefix for answer in self._answers.values()):
            self._retired.add(prefix)
        else:
            self._retired.discard(prefix)
            self.engine.forget(prefix)

    def fail(self, error: BackendError) -> None:
        """Ends all with an error; the engine isn't touched any more."""
        self._retired.clear()
        for number in list(self._answers):
            self._refuse(number, error)

    def _end(self, number: Hashable) -> None:
        answer = self._answers.pop(number)
        self.ended(time.monotonic() - answer.stream.submitted)
        if answer.prefix in self._retired:
            self.retire(answer.prefix)

    def _refuse(self, number: Hashable, error: BackendError) -> None:
        stream = self._answers[number].stream
        self._end(number)
        deliver({stream: [error]})
