"""The way back from the worker's thread into the event loop that asked."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from ptuning.generation import Token
from ptuning.serving.backend import BackendError, Job
from ptuning.serving.models import Loaded

log = logging.getLogger("ptuning.serving")


class Group:
    """The answers to one HTTP request. Made and read in an event loop, filled by the worker.

    Args:
        model: that answers.
        jobs: what is asked.
        drop: tells the worker that nobody wants some of the answers any more.
    """

    def __init__(self, model: Loaded, jobs: Sequence[Job], drop: Callable[["Group", set[int]], None]):
        self.model, self.jobs, self.drop = model, jobs, drop
        self.submitted = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Token] | BackendError] = asyncio.Queue()
        self.open = set(range(len(jobs)))

    def __aiter__(self) -> "Group":
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

    def deliver(self, events: list) -> None:
        for event in events:
            self.events.put_nowait(event)


def deliver(events: dict[Group, list]) -> None:
    """Hands events to their groups: one wake-up a loop and step, however many answers there are."""
    loops: dict[asyncio.AbstractEventLoop, list] = {}
    for group, items in events.items():
        loops.setdefault(group.loop, []).append((group, items))
    for loop, groups in loops.items():
        call(loop, _hand_out, groups)


def _hand_out(groups: list[tuple[Group, list]]) -> None:
    for group, items in groups:
        group.deliver(items)


def call(loop: asyncio.AbstractEventLoop, function: Callable, *args) -> None:
    """Has a function called in an event loop, from any thread."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed, so nobody waits there
        log.debug("an event loop went away before its answer came")
