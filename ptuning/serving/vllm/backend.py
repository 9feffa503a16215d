"""The Backend on vLLM: it computes, and everything that is text or a name stays here."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial

from ptuning.errors import PTuningError
from ptuning.families import Template
from ptuning.generation import GenerationRequest
from ptuning.generation.vllm.client import BrokeOff, NobodyAnswers, VllmClient
from ptuning.generation.vllm.replicas import Replicas
from ptuning.generation.vllm.stream import RequestRefused
from ptuning.methods import Stored
from ptuning.serving.access import Metrics
from ptuning.serving.backend import (
    BackendError,
    NameTaken,
    Refused,
    Served,
    Stats,
    TooLate,
    Unavailable,
)
from ptuning.serving.models import Registry
from ptuning.serving.options import ServeOptions
from ptuning.serving.places import Places
from ptuning.serving.scheduler import AnswerStream, call
from ptuning.serving.vllm.names import NameTable, put

log = logging.getLogger("ptuning.serving")

_STOPPED = "the server is shutting down"
_BARE = Stored()


class VllmBackend:
    """Answers by vLLM's token endpoint.

    Args:
        options: of the command.
        template: of the base.
        registry: the names, over `names`.
        names: shared with other servers.
        replicas: looked at, not yet watched.
        lengths: tokens of prompt and answer, and those that vLLM takes, prefix included.
        metrics: is told of tokens.
    """

    when_down = "vLLM down"

    def __init__(
        self,
        options: ServeOptions,
        template: Template,
        registry: Registry,
        names: NameTable,
        replicas: Replicas,
        lengths: tuple[int, int],
        metrics: Metrics,
    ):
        self.options, self.template, self.registry, self.names = options, template, registry, names
        self.replicas, self.metrics = replicas, metrics
        self.context, self.most = lengths
        together = options.max_concurrent * len(replicas.all)
        self.places = Places(together, options.max_queue, "--max_concurrent for each --vllm_url, + --max_queue")
        self.capacity = self.places.capacity
        self._draining = False
        self._running = 0
        self._streams: dict[AnswerStream, dict[int, asyncio.Task]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # in which requests come, with what belongs to it:
        self._client: VllmClient
        self._free: asyncio.Semaphore

    # --- the interface ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.replicas.start()

    def served(self) -> list[Served]:
        return list(self.registry)

    def find(self, name: str) -> Served:
        return self.registry.find(name)

    def submit(self, model: str, requests: Sequence[GenerationRequest]) -> AnswerStream:
        served = self.registry.find(model)
        self._check_open()
        if any(request.sampling.constraint is not None for request in requests):
            raise Refused(
                "an answer's form (response_format, guided_choice) is kept by --engine continuous alone; leave it out"
            )
        if served.pre_seq_len + self.context > self.most:
            raise Refused(self._too_long(served.name, served.pre_seq_len))
        self.places.take(len(requests))
        self._here()
        stream = AnswerStream(served, requests, self._drop)
        self._streams[stream] = {}
        for index, request in enumerate(requests):
            task = asyncio.ensure_future(self._answer(stream, index, request))
            # A task that is cancelled before its first step runs none of its own code.
            task.add_done_callback(partial(self._ended, stream, index))
            self._streams[stream][index] = task
        self.metrics.prompt_tokens(served.name, sum(len(request.ids) for request in requests))
        return stream

    async def add_prefix(self, name: str, folder: str) -> Served:
        self._check_open()
        return await asyncio.to_thread(self._add, name, folder)

    async def remove_prefix(self, name: str) -> None:
        await asyncio.to_thread(self.registry.remove, name)

    def stats(self) -> Stats:
        return Stats(self._running, max(self.places.live - self._running, 0), self.replicas.alive, self._draining)

    def drain(self) -> None:
        self._draining = True

    def on_death(self, tell: Callable[[], None]) -> None:
        """Never: each vLLM may come back, and is asked whether it has."""

    def wait_idle(self, seconds: float) -> bool:
        return self.places.wait_until_free(seconds)

    def close(self) -> None:
        self._draining = True
        self.replicas.close()
        if self._loop is not None:
            call(self._loop, self._fail_all)

    # --- in the event loop ------------------------------------------------------------------------------------------------

    def _here(self) -> None:
        """What belongs to the event loop that serves; made in it."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._free = loop, asyncio.Semaphore(self.places.together)
            self._client = VllmClient(self.replicas, self.template.stop_ids, self.names.store, self.places.together)

    async def _answer(self, stream: AnswerStream, index: int, request: GenerationRequest) -> None:
        """Puts one answer's tokens, or why there are none, into its stream."""
        seconds = self.options.request_timeout
        try:
            async with asyncio.timeout(seconds), self._free:
                self._running += 1
                self.metrics.queued(stream.model.name, time.monotonic() - stream.submitted)
                try:
                    await self._put_tokens(stream, index, request)
                finally:
                    self._running -= 1
        except TimeoutError:
            text = f"not finished within {seconds:g} s (--request_timeout); ask for fewer tokens, or later"
            stream.events.put_nowait(TooLate(text))
        except BackendError as error:
            stream.events.put_nowait(error)
        except Exception:
            log.exception("an answer of vLLM's can't be read")
            stream.events.put_nowait(Unavailable("an error of the server's; its log says more"))

    async def _put_tokens(self, stream: AnswerStream, index: int, request: GenerationRequest) -> None:
        stored, latest, first = stream.model.prefix or _BARE, stream.submitted, True
        try:
            async with aclosing(self._client.answer(request, stored)) as answer:
                async for token in answer:
                    stream.events.put_nowait((index, token))
                    if token.token is not None:
                        now = time.monotonic()
                        self.metrics.token(stream.model.name, now - latest, first=first)
                        first, latest = False, now
        except RequestRefused:
            raise Refused("vLLM refuses this request; the server's log says why") from None
        except NobodyAnswers as error:
            text = "no vLLM can answer at the moment; ask again later" if error.reason else self._down()
            raise Unavailable(text) from None
        except BrokeOff as error:
            raise Unavailable(f"vLLM failed after {error.tokens} tokens of this answer; ask again") from None

    def _drop(self, stream: AnswerStream, indices: set[int]) -> None:
        """Called in the event loop: closing the connection frees the place in vLLM."""
        for index in indices:
            if (task := self._streams.get(stream, {}).get(index)) is not None:
                task.cancel()

    def _fail_all(self) -> None:
        for stream, tasks in list(self._streams.items()):
            stream.events.put_nowait(Unavailable(_STOPPED))
            for task in tasks.values():
                task.cancel()
        self._closing = asyncio.ensure_future(self._client.aclose())

    def _ended(self, stream: AnswerStream, index: int, task: asyncio.Task) -> None:
        tasks = self._streams[stream]
        del tasks[index]
        if not tasks:
            del self._streams[stream]
        self.places.give_back(time.monotonic() - stream.submitted)

    # --- names ------------------------------------------------------------------------------------------------------------

    def _add(self, name: str, folder: str) -> Served:
        self.registry.check_name(name)
        try:
            served = put(name, folder, self.options.model, self.names.store)
        except PTuningError as error:
            raise Refused(str(error)) from error
        except Exception as error:  # whatever a strange path or file leads to
            log.warning("prefix refused", exc_info=error, extra={"fields": {"folder": folder}})
            raise Refused(f"{folder}: can't be read as a prefix; the server's log says why") from error
        if served.pre_seq_len + self.context > self.most:
            raise Refused(self._too_long(name, served.pre_seq_len))
        if not self.names.claim(served):
            raise NameTaken(f"there is a prefix {name!r} already; remove it first, or use another name")
        return served

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable(_STOPPED)
        if not self.replicas.alive:
            raise Unavailable(self._down())

    def _down(self) -> str:
        return f"vLLM is down ({len(self.replicas.all)} tried); it is asked every second whether it is back"

    def _too_long(self, name: str, length: int) -> str:
        left = self.most - self.context
        return (
            f"prefix {name!r} has {length} positions, and vLLM's --max-model-len {self.most} leaves {left} beside the "
            f"context of {self.context}; start vLLM with --max-model-len {self.context + length}"
        )
