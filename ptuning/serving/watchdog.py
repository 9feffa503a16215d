"""Notices a step of the model that doesn't end: a device that hangs, a deadlock in a library."""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("ptuning.serving")

_LOOKS = 4  # within the limit


class Watchdog:
    """Looks, from a thread of its own, how long the step under way has taken.

    A thread that hangs in a kernel can't be stopped from within its process. So it is said: in the log, once, with where the
    thread is, and by `stuck`, so that /health fails and what watches it restarts the server.

    Args:
        limit: seconds that a step may take.
        meanwhile: is called at each look while a step takes longer.
    """

    def __init__(self, limit: float, meanwhile: Callable[[], None]):
        self.limit, self.meanwhile = limit, meanwhile
        self._step: tuple[float, int] | None = None  # when it began, in which thread
        self._told: float | None = None  # of the step that was logged, when it began
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ptuning-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        began = time.monotonic()
        self._step = began, threading.get_ident()
        try:
            yield
        finally:
            self._step = None
            if self._told == began:
                log.warning("the step ended after %.0f s; requests are answered again", time.monotonic() - began)

    @property
    def stuck(self) -> float:
        """Seconds that the step under way has taken, where these are more than it may; else 0."""
        step = self._step
        seconds = 0.0 if step is None else time.monotonic() - step[0]
        return seconds if seconds > self.limit else 0.0

    def _run(self) -> None:
        while not self._over.wait(self.limit / _LOOKS):
            step = self._step
            if step is None or not self.stuck:
                continue
            began, thread = step
            if self._told != began:
                self._told = began
                frame = sys._current_frames().get(thread)
                where = "" if frame is None else "".join(traceback.format_stack(frame))
                text = "a step has not ended after %g s (--step_timeout); restart the server if it stays so"
                log.error(text, self.limit, extra={"fields": {"stack": where}})
            self.meanwhile()
