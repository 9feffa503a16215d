"""All that a serving process writes to stderr is JSON, one object a line, and no flood."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from transformers.utils import logging as transformers_logging

_OFTEN = 20  # lines of one kind …
_PERIOD = 60.0  # … in so many seconds


class JsonLines(logging.Formatter):
    """{"time", "level", "message", …} with the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Brake(logging.Filter):
    """Lets through a few lines of one kind a minute: what anybody can provoke from outside must not fill a disk. The first
    line after a pause says how many were left out.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.clock = clock
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}  # (logger, text) → since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = (record.name, str(record.msg)[:200]), self.clock()
        since, count = self._kinds.get(kind, (now, 0))
        if now - since >= _PERIOD:
            if count > _OFTEN:
                record.fields = getattr(record, "fields", {}) | {"left_out": count - _OFTEN}
            since, count = now, 0
        if len(self._kinds) > 1000:  # texts that differ each time are no kind
            self._kinds.clear()
        self._kinds[kind] = (since, count + 1)
        return count < _OFTEN


def configure_logs() -> None:
    """Sends the logs, warnings and uncaught exceptions of the whole process to stderr as JSON lines."""
    ours, others = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stderr)
    for handler in (ours, others):
        handler.setFormatter(JsonLines())
    others.addFilter(Brake())
    logging.captureWarnings(True)
    transformers_logging.disable_progress_bar()
    for name in list(logging.root.manager.loggerDict):  # transformers and others have handlers of their own
        logger = logging.getLogger(name)
        if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
            logger.handlers, logger.propagate = [], True
    _set("", logging.WARNING, others)
    _set("ptuning.serving", logging.INFO, ours)
    _set("ptuning.serving.connections", logging.INFO, others)
    _set("uvicorn", logging.WARNING, others)
    sys.excepthook = lambda kind, error, trace: _uncaught("uncaught exception", (kind, error, trace))
    threading.excepthook = lambda args: _uncaught(
        "uncaught exception in a thread", (args.exc_type, args.exc_value, args.exc_traceback)
    )


def follow(stream: IO[bytes], message: str) -> threading.Thread:
    """Puts the lines that another process writes into this one's log, until it ends. Returns the thread that does it."""
    log = logging.getLogger("ptuning.serving.connections")  # the one with a brake

    def run() -> None:
        with stream:
            for line in stream:
                if text := line.decode(errors="replace").rstrip():
                    log.warning(message, extra={"fields": {"text": text}})

    thread = threading.Thread(target=run, name=message, daemon=True)
    thread.start()
    return thread


def _set(name: str, level: int, handler: logging.Handler) -> None:
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


def _uncaught(message: str, info: tuple) -> None:
    if issubclass(info[0], KeyboardInterrupt):
        return
    logging.getLogger("ptuning.serving").critical(message, exc_info=info)
