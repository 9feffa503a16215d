"""The thread that owns the model: commands in, one engine step at a time, tokens out.

Everything that touches the engine or torch happens in this thread. The HTTP side puts commands into a queue, and tokens
come back through the event loop that asked.
"""

import asyncio
import logging
import queue
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptuning.errors import PTuningError
from ptuning.generation import Engine, GenerationRequest
from ptuning.language import speaking
from ptuning.serving.access import Metrics
from ptuning.serving.backend import BackendError, Busy, Refused, Served, Stats, Unavailable
from ptuning.serving.models import LoadedModel, Registry
from ptuning.serving.places import Places
from ptuning.serving.scheduler import AnswerStream, Scheduler, call, deliver
from ptuning.serving.watchdog import Watchdog

log = logging.getLogger("ptuning.serving")

_STOPPED = "the server is shutting down"
_DEAD = "the model's thread has failed and the server ends; ask again when it has been started anew. Its log says why"
_PATIENCE = 3.0  # seconds for the step under way at the end; the thread is a daemon, so the process can end without it


@dataclass(frozen=True)
class _Command:
    run: Callable[[], None]
    fail: Callable[[BackendError], None]


class Worker:
    """The Backend on ptuning's own engine. Call `start` before anything else and `close` at the end. An error that isn't one
    request's own ends it: what the model's memory holds then, nobody knows.

    Args:
        loaded: the base.
        registry: the names of the base and its prefixes.
        engine: not yet entered.
        max_queue: answers that may wait beside the engine's max_rows.
        timeout: seconds that a request may take, waiting included.
        step_timeout: seconds that a step may take; one that takes longer is told of.
        metrics: is told what happens.
    """

    when_down = "worker died"

    def __init__(
        self,
        loaded: LoadedModel,
        registry: Registry,
        engine: Engine,
        *,
        max_queue: int,
        timeout: float,
        step_timeout: float,
        metrics: Metrics,
    ):
        self.loaded, self.registry, self.engine = loaded, registry, engine
        self.template, self.context = loaded.template, loaded.context
        self.places = Places(engine.max_rows, max_queue, "--max_concurrent + --max_queue")
        self.capacity = self.places.capacity
        self._scheduler = Scheduler(engine, timeout, metrics, self.places.give_back)
        self._watchdog = Watchdog(step_timeout, self._scheduler.tell_late)
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._loading: set[str] = set()
        self._draining = self._closing = False
        self._change = threading.Lock()  # guards what follows, and what is posted
        self._dead: str | None = None  # why, once no commands are taken any more
        self._failed = False  # that was an error, and everybody has been told
        self._tell_death: Callable[[], None] = _nothing
        self._thread = threading.Thread(target=self._run, name="ptuning-worker", daemon=True)

    # --- the interface; for any thread with a running event loop --------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def served(self) -> list[Served]:
        return list(self.registry)

    def find(self, name: str) -> Served:
        return self.registry.find(name)

    def submit(self, model: str, requests: Sequence[GenerationRequest]) -> AnswerStream:
        served = self.registry.find(model)
        self._check_open()
        self.places.take(len(requests))
        stream = AnswerStream(served, requests, self._forget)
        self._post(lambda: self._scheduler.begin(stream), lambda error: self._fail(stream, error))
        return stream

    async def add_prefix(self, name: str, folder: str) -> Served:
        self._check_open()
        self.registry.check_name(name)
        if name in self._loading:
            raise Busy(f"a prefix {name!r} is being loaded already; ask again later", retry_after=1)
        self._loading.add(name)
        try:
            return await self._ask(lambda: self._load(name, folder))
        finally:
            self._loading.discard(name)

    async def remove_prefix(self, name: str) -> None:
        prefix = self.registry.remove(name).prefix
        self._post(lambda: self._scheduler.retire(prefix), _ignore)

    def stats(self) -> Stats:
        rows = list(self.engine.rows)
        columns = max((row.columns for row in rows), default=0)
        reserved = min(len(rows) * columns / self.engine.budget.most, 1.0)
        kept = self.engine.prefix_cache.tokens
        waiting = max(self.places.live - len(rows), 0)
        alive, stuck = self._dead is None, self._watchdog.stuck
        return Stats(len(rows), waiting, alive, self._draining, reserved, kept, stuck)

    def drain(self) -> None:
        self._draining = True

    def on_death(self, tell: Callable[[], None]) -> None:
        with self._change:
            self._tell_death, failed = tell, self._failed
        if failed:
            tell()

    def wait_idle(self, seconds: float) -> bool:
        return self.places.wait_until_free(seconds)

    def close(self) -> None:
        self._draining = True
        self._post(self._stop, _ignore)
        if self._thread.is_alive():
            self._thread.join(timeout=_PATIENCE)
        self._watchdog.stop()

    # --- inside the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with speaking("en"), self.engine:  # what it says goes into the log
                while not self._closing:
                    self._run_commands()
                    self._scheduler.expire()
                    if self.engine.has_work and not self._closing:
                        with self._watchdog.step():
                            self._scheduler.step()
        except BaseException as error:
            log.critical("the worker died", exc_info=error)
            self._die(_DEAD)
            with self._change:
                self._failed, tell = True, self._tell_death
            tell()
        else:
            self._die(_STOPPED)

    def _run_commands(self) -> None:
        """Runs the commands that are there; waits for one if there is nothing else to do."""
        if not self.engine.has_work:
            self._commands.get().run()
        while not self._closing and not self._commands.empty():
            self._commands.get().run()

    def _stop(self) -> None:
        self._closing = True

    def _die(self, reason: str) -> None:
        """All get the reason: a command that is never taken would be a request that hangs."""
        with self._change:
            self._dead = reason
        self._scheduler.fail(Unavailable(reason))
        while not self._commands.empty():
            self._commands.get().fail(Unavailable(reason))

    def _load(self, name: str, folder: str) -> Served:
        try:
            served = self.loaded.read_prefix(name, folder)
        except PTuningError as error:
            log.warning("prefix refused", extra={"fields": {"folder": folder, "reason": str(error)}})
            raise Refused(without_listing(str(error))) from error
        except Exception as error:  # whatever a strange path or file leads to, the running answers go on
            log.warning("prefix refused", exc_info=error, extra={"fields": {"folder": folder}})
            raise Refused(f"{folder}: can't be read as a prefix; the server's log says why") from error
        self.registry.add(served)
        return served

    # --- between the two ------------------------------------------------------------------------------------------------

    def _post(self, run: Callable[[], None], fail: Callable[[BackendError], None]) -> None:
        """Gives the thread something to do before its next step; `fail` is called instead where it has died."""
        with self._change:
            if self._dead is None:
                self._commands.put(_Command(run, fail))
                return
        fail(Unavailable(self._dead))

    async def _ask(self, work: Callable[[], Served]) -> Served:
        """Has the thread do something and waits for the result."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def finish(result: Served | None, error: BackendError | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)

        def run() -> None:
            try:
                call(loop, finish, work(), None)
            except BackendError as error:
                call(loop, finish, None, error)

        self._post(run, lambda error: call(loop, finish, None, error))
        return await future

    def _check_open(self) -> None:
        if self._dead is not None:
            raise Unavailable(self._dead)
        if self._draining:
            raise Unavailable(_STOPPED)
        if seconds := self._watchdog.stuck:
            raise Unavailable(
                f"the model has computed one step for {seconds:.0f} s and answers nobody; ask again later"
            )

    def _forget(self, stream: AnswerStream, indices: set[int]) -> None:
        """These answers are no longer wanted; their places are free before the next step."""
        self._post(lambda: self._scheduler.drop(stream, indices), _ignore)

    def _fail(self, stream: AnswerStream, error: BackendError) -> None:
        """A stream that never began, because the thread has died."""
        for _ in stream.requests:
            self.places.give_back(0.0)
        deliver({stream: [error]})


def without_listing(text: str) -> str:
    """An error about a folder without the names of the files that were found in it: an admin may add prefixes, not look around
    on the server's disks."""
    return re.sub(r" \(found .*\)", "", text, flags=re.DOTALL)


def _nothing() -> None:
    """Nobody wants to know."""


def _ignore(error: BackendError) -> None:
    """The thread has died, and with it what this was about."""
