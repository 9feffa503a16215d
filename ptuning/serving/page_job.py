"""An answer on its way, in a thread that a page can redraw from and stop."""

import asyncio
import contextlib
import threading

from page_client import Api, ApiProblem, Sampling, stream_chat


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
