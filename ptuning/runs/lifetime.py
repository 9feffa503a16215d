"""A run while it lives and as it ends: the lock on its folder, its outcome, and SIGTERM as a kind of Ctrl-C."""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

from ptuning.errors import ConfigError
from ptuning.messages import message, note
from ptuning.runs.files import read_json_if_possible, write_json
from ptuning.runs.folder import LOCK, OUTCOME, RunFolder

_CLOCK = 10.0  # seconds by which a process's start may be told differently after the clock was set
_WRITING = 1.0  # seconds after which a lock that is still empty was left by a kill

# What must still happen where os._exit ends the process; the last added first.
_last_words: list[Callable[[str], None]] = []


# --- lock -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: RunFolder, say: Callable[[str], None] = print) -> Iterator[None]:
    """Keeps other runs out of the folder while the block runs. Only the main process of a run takes the lock.

    Args:
        say: prints the line about a lock that was left behind.

    Raises:
        ConfigError: another run is at work in the folder, or there can't be such a folder.
    """
    path, mine = folder / LOCK, _this_process()
    try:
        made = [parent for parent in (folder.path, *folder.path.parents) if not parent.exists()]
        folder.path.mkdir(parents=True, exist_ok=True)
        while not _create(path, mine):
            theirs = _holder(path)
            _refuse_living(path, theirs)
            if _delete_stale(path, theirs):
                known = _is_whole(theirs)
                whose = message("whose_lock", pid=theirs["pid"], started=theirs["started"]) if known else ""
                say(note(message("took_over", path=path, whose=whose)))
    except OSError as error:
        raise ConfigError(_why_no_folder(folder.path, error)) from error

    def release(reason: str = "") -> None:
        if read_json_if_possible(path) == mine:
            path.unlink()

    _last_words.append(release)
    try:
        yield
    finally:
        _last_words.remove(release)
        release()
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: something was written
                parent.rmdir()


def running_since(folder: RunFolder) -> str | None:
    """When the run began that a process of this machine is doing in the folder now; None where there is none, or it has
    written its outcome.
    """
    holder = read_json_if_possible(folder / LOCK)
    if not _is_whole(holder) or holder["host"] != socket.gethostname() or not _is_alive(holder):
        return None
    try:
        outcome, lock = folder / OUTCOME, folder / LOCK
        ended = (
            outcome.exists() and outcome.stat().st_mtime_ns >= lock.stat().st_mtime_ns
        )  # else it is an earlier run's
    except OSError:  # it ends just now
        return None
    return None if ended else str(holder["started"])


def _why_no_folder(path: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        file = next((place for place in (path, *path.parents) if place.is_file()), path)
        return f"--output_dir {path}: {file} is a file; name a new folder"
    shown = f"{str(path)[:100]}{'…' if len(str(path)) > 100 else ''}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        there = next((place for place in (path, *path.parents) if place.exists()), path)
        why = "on a read-only file system" if error.errno == errno.EROFS else "not writable for this user"
        return f"--output_dir {shown}: {there} is {why}; name a folder elsewhere"
    return f"--output_dir {shown}: {error.strerror}; name a folder that can be made"


def _this_process() -> dict:
    created = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": now(), "create_time": created}


def _create(path: Path, content: dict) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
    return True


def _holder(path: Path) -> dict:
    """What the lock says; where that isn't whole, once it can't be in the middle of being written any more."""
    end = time.monotonic() + _WRITING
    while True:
        found = read_json_if_possible(path)
        if _is_whole(found) or not path.exists() or time.monotonic() > end:
            return found
        time.sleep(0.05)


def _is_whole(holder: dict) -> bool:
    return isinstance(holder.get("pid"), int) and {"host", "started"} <= set(holder)


def _refuse_living(path: Path, theirs: dict) -> None:
    if not _is_whole(theirs):
        return
    run = f"process {theirs['pid']} on {theirs['host']}, started {theirs['started']}"
    if theirs["host"] != socket.gethostname():
        raise ConfigError(
            f"{path.parent}: a run is at work there: {run}. Whether it still is can't be seen from {socket.gethostname()}; if "
            f"it has ended, delete {path}"
        )
    if _is_alive(theirs):
        raise ConfigError(
            f"{path.parent}: a run is at work there: {run}. Wait for it, stop it with kill {theirs['pid']}, or choose another "
            "--output_dir"
        )


def _is_alive(holder: dict) -> bool:
    try:
        process = psutil.Process(holder["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        created = holder.get("create_time")
        return not isinstance(created, int | float) or abs(process.create_time() - created) < _CLOCK
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _delete_stale(path: Path, content: dict) -> bool:
    """Deletes a lock that was left behind, unless another process has just done that and taken it.

    Only one process at a time looks and deletes: else a second one, which has seen the old lock, would delete the new one.
    """
    guard = path.with_name(f"{path.name}.stale")
    if not _create(guard, {}):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - guard.stat().st_mtime > _CLOCK:  # its maker was killed
                guard.unlink()
        time.sleep(0.02)
        return False
    try:
        if read_json_if_possible(path) != content or not path.exists():
            return False
        path.unlink()
        return True
    finally:
        guard.unlink(missing_ok=True)


# --- outcome --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def outcome(folder: RunFolder, then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Writes outcome.json when the block ends: finished, failed with the error, or interrupted; and when.

    Args:
        then: is called after that, also after an error, such as to write the report. What goes wrong in it is a note, because
            it must not hide how the run ended.
    """
    started = now()

    def write(status: str, error: str | None) -> None:
        write_json(folder / OUTCOME, {"status": status, "error": error, "started": started, "ended": now()})
        try:
            then()
        except Exception as problem:
            print(note(message("no_report", problem=repr(problem))), file=sys.stderr)

    def stopped(reason: str) -> None:
        write("interrupted", reason)

    _last_words.append(stopped)
    status, error = "finished", None
    try:
        yield
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except BaseException as cause:
        status, error = "failed", f"{type(cause).__name__}: {cause}"
        raise
    finally:
        _last_words.remove(stopped)
        write(status, error)


def end_suddenly(reason: str) -> None:
    """For a signal handler that is about to call os._exit: writes outcome and report as interrupted and gives up the lock.

    Args:
        reason: why, for outcome.json.
    """
    for act in reversed(_last_words):
        with contextlib.suppress(Exception):
            act(reason)


def now() -> str:
    """The time of day with its zone, to the second."""
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


# --- SIGTERM --------------------------------------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """128 + the signal's number: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated in the main thread, so that a run ends as after Ctrl-C. Elsewhere it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut off the report
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
