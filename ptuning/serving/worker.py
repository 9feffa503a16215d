"""The thread that owns the model: commands in, one engine step at a time, tokens out.

Everything that touches the engine or torch happens in this thread. The HTTP side puts commands into a queue, and tokens
come back through the event loop that asked.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptuning.errors import GenerationError, PTuningError
from ptuning.generation import Engine, Prefix, Request, Token
from ptuning.serving.backend import BackendError, Busy, Job, Refused, Served, Stats, TooLate, Unavailable
from ptuning.serving.metrics import Metrics
from ptuning.serving.models import Loaded, Models

log = logging.getLogger("ptuning.serving")

_STOPPED = "the server is shutting down"


@dataclass(frozen=True)
class _Command:
    run: Callable[[], None]
    fail: Callable[[BackendError], None]


class _Group:
    """The answers to one HTTP request. Made and read in an event loop, filled by the worker."""

    def __init__(self, worker: "Worker", model: Loaded, jobs: Sequence[Job]):
        self.worker, self.model, self.jobs = worker, model, jobs
        self.submitted = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Token] | BackendError] = asyncio.Queue()
        self.open = set(range(len(jobs)))

    def __aiter__(self) -> "_Group":
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
            self.worker.post(lambda: self.worker.drop(self, gone), lambda error: None)

    def deliver(self, events: list) -> None:
        for event in events:
            self.events.put_nowait(event)


@dataclass(eq=False)
class _Running:
    """A job that the engine has."""

    group: _Group
    index: int
    prefix: Prefix | None
    latest: float  # when its latest token came, at first when it was submitted
    tokens: int = 0


class Worker:
    """The Backend on ptuning's own engine. Call `start` before anything else and `close` at the end.

    Args:
        models: the base and its prefixes.
        engine: not yet entered.
        max_queue: answers that may wait beside the engine's max_rows.
        timeout: seconds that a request may take, waiting included.
        metrics: is told what happens.
    """

    def __init__(self, models: Models, engine: Engine, *, max_queue: int, timeout: float, metrics: Metrics):
        self.models, self.engine, self.timeout, self.metrics = models, engine, timeout, metrics
        self.tokenizer = models.tokenizer
        self.context = models.model.config.max_position_embeddings
        self.capacity = engine.max_rows + max_queue
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._running: dict[int, _Running] = {}
        self._retired: set[Prefix] = set()
        self._change = threading.Condition()  # guards the five below
        self._live = 0  # jobs between submit and their end
        self._seconds = 1.0  # a job's usual time
        self._draining = False
        self._dead: str | None = None  # why, once it is
        self._gone = False  # nobody takes commands any more
        self._loading: set[str] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ptuning-worker", daemon=True)

    # --- the interface; for any thread with a running event loop --------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def served(self) -> list[Served]:
        return [loaded.served for loaded in self.models]

    def find(self, name: str) -> Served:
        return self.models.find(name).served

    def submit(self, model: str, jobs: Sequence[Job]) -> _Group:
        loaded = self.models.find(model)
        with self._change:
            self._check_open()
            if self._live + len(jobs) > self.capacity:
                rows = self.engine.max_rows
                raise Busy(
                    f"{self._live} answers run or wait and {len(jobs)} more are asked for, the limit is {self.capacity} "
                    "(--max_concurrent + --max_queue); ask again later",
                    retry_after=int(min(max(self._seconds * self._live / rows / 2, 1), 60)),
                )
            self._live += len(jobs)
        group = _Group(self, loaded, jobs)
        self.post(lambda: self._begin(group), lambda error: self._fail(group, len(jobs), error))
        return group

    async def add_prefix(self, name: str, folder: str) -> Served:
        with self._change:
            self._check_open()
        self.models.check_name(name)
        if name in self._loading:
            raise Busy(f"a prefix {name!r} is being loaded already; ask again later", retry_after=1)
        self._loading.add(name)
        try:
            return await self._ask(lambda: self._load(name, folder))
        finally:
            self._loading.discard(name)

    async def remove_prefix(self, name: str) -> None:
        prefix = self.models.remove(name).prefix
        self.post(lambda: self._retire(prefix), lambda error: None)

    def stats(self) -> Stats:
        running = len(self.engine.rows)
        return Stats(running, max(self._live - running, 0), self._dead is None, self._draining)

    def drain(self) -> None:
        self._draining = True

    def wait_idle(self, seconds: float) -> bool:
        with self._change:
            return self._change.wait_for(lambda: not self._live, timeout=seconds)

    def close(self) -> None:
        self._draining = True
        self.post(self._stop, lambda error: self._stop())
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def post(self, run: Callable[[], None], fail: Callable[[BackendError], None]) -> None:
        """Gives the thread something to do before its next step; `fail` is called instead where it has died."""
        with self._change:
            if not self._gone:
                self._commands.put(_Command(run, fail))
                return
        fail(Unavailable(self._dead or _STOPPED))

    # --- inside the thread ----------------------------------------------------------------------------------------------

    def drop(self, group: _Group, indices: set[int]) -> None:
        """Takes a group's answers out of the engine; nobody wants them any more."""
        for number, job in list(self._running.items()):
            if job.group is group and job.index in indices:
                self.engine.cancel(number)
                self._end(number)

    def _run(self) -> None:
        try:
            with self.engine:
                while not self._closing:
                    self._obey()
                    self._expire()
                    if self.engine.has_work and not self._closing:
                        self._step()
        except BaseException as error:
            log.exception("the worker died")
            self._die(f"the worker died ({type(error).__name__}: {error}); restart the server")
        else:
            self._die(_STOPPED)

    def _obey(self) -> None:
        """Runs the commands that are there; waits for one if there is nothing else to do."""
        if not self.engine.has_work:
            self._commands.get().run()
        while not self._closing and not self._commands.empty():
            self._commands.get().run()

    def _begin(self, group: _Group) -> None:
        for index, job in enumerate(group.jobs):
            number = next(self._numbers)
            self._running[number] = _Running(group, index, group.model.prefix, group.submitted)
            request = Request(
                number, job.ids, job.max_new_tokens, job.sampling, prefix=group.model.prefix, logprobs=job.logprobs
            )
            try:
                self.engine.add(request)
            except ValueError as error:
                self._refuse(number, Refused(str(error)))
        self.metrics.prompt_tokens(group.model.served.name, sum(len(job.ids) for job in group.jobs))

    def _expire(self) -> None:
        now = time.monotonic()
        for number, job in list(self._running.items()):
            if now - job.group.submitted > self.timeout:
                self.engine.cancel(number)
                message = (
                    f"not finished within {self.timeout:g} s (--request_timeout); ask for fewer tokens or try later"
                )
                self._refuse(number, TooLate(message))

    def _step(self) -> None:
        try:
            tokens = self.engine.step()
        except GenerationError as error:
            self._refuse(error.request, Refused(str(error)))
            return
        now = time.monotonic()
        events: dict[_Group, list] = {}
        for token in tokens:
            job = self._running[token.id]
            events.setdefault(job.group, []).append((job.index, token))
            if token.token is not None:
                self.metrics.token(job.group.model.served.name, now - job.latest, first=not job.tokens)
                job.tokens, job.latest = job.tokens + 1, now
            if token.finish is not None:
                self._end(token.id)
        _deliver(events)

    def _end(self, number: int) -> None:
        """A job is over, whatever the reason."""
        job = self._running.pop(number)
        with self._change:
            self._live -= 1
            self._seconds += 0.1 * (time.monotonic() - job.group.submitted - self._seconds)
            self._change.notify_all()
        if job.prefix in self._retired:
            self._retire(job.prefix)

    def _refuse(self, number: int, error: BackendError) -> None:
        job = self._running[number]
        self._end(number)
        self.metrics.error(error.code)
        _deliver({job.group: [error]})

    def _fail(self, group: _Group, jobs: int, error: BackendError) -> None:
        """A group that never began, because the thread has died."""
        with self._change:
            self._live -= jobs
            self._change.notify_all()
        _deliver({group: [error]})

    def _die(self, reason: str) -> None:
        """Everybody gets the reason: a command that nobody takes would be a request that hangs."""
        with self._change:
            self._dead, self._gone = reason, True
        for number in list(self._running):
            self._refuse(number, Unavailable(reason))
        while not self._commands.empty():
            self._commands.get().fail(Unavailable(reason))

    def _stop(self) -> None:
        self._closing = True

    def _load(self, name: str, folder: str) -> Served:
        try:
            loaded = self.models.read(name, folder)
        except PTuningError as error:
            raise Refused(str(error)) from error
        except Exception as error:  # whatever a strange path or file leads to, the running answers go on
            raise Refused(f"{folder}: can't be read as a prefix ({type(error).__name__}: {error})") from error
        self.models.add(loaded)
        return loaded.served

    def _retire(self, prefix: Prefix) -> None:
        """Forgets the dialogues of a removed prefix, at the latest when its last answer is done."""
        if any(job.prefix is prefix for job in self._running.values()):
            self._retired.add(prefix)
        else:
            self._retired.discard(prefix)
            self.engine.forget(prefix)

    # --- between the two ------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._dead is not None:
            raise Unavailable(self._dead)
        if self._draining:
            raise Unavailable(_STOPPED)

    async def _ask(self, work: Callable[[], Served]) -> Served:
        """Has the thread do something and waits for the result."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle(result: Served | None, error: BackendError | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)

        def run() -> None:
            try:
                _call(loop, settle, work(), None)
            except BackendError as error:
                _call(loop, settle, None, error)

        self.post(run, lambda error: _call(loop, settle, None, error))
        return await future


def _deliver(events: dict[_Group, list]) -> None:
    """One wake-up a loop and step, however many answers there are."""
    loops: dict[asyncio.AbstractEventLoop, list] = {}
    for group, items in events.items():
        loops.setdefault(group.loop, []).append((group, items))
    for loop, groups in loops.items():
        _call(loop, _hand_out, groups)


def _hand_out(groups: list[tuple[_Group, list]]) -> None:
    for group, items in groups:
        group.deliver(items)


def _call(loop: asyncio.AbstractEventLoop, function: Callable, *args) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed, so nobody waits there
        log.debug("an event loop went away before its answer came")
