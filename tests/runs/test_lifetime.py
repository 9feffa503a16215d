"""The lock on a run's folder, how a run ended, and SIGTERM."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from ptuning.errors import ConfigError
from ptuning.runs import RunFolder, exit_status, lock, outcome, running_since, terminate_as_interrupt
from ptuning.runs.lifetime import Terminated


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def start(code, *args):
    """A process that runs the code; it prints a line when it is ready."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


HOLD = """
    import sys
    from ptuning.runs import RunFolder, lock
    with lock(RunFolder(sys.argv[1])):
        print("ready", flush=True)
        sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    process = start(HOLD, tmp_path)
    try:
        held = read(tmp_path / "run.lock")
        assert held["pid"] == process.pid
        with pytest.raises(ConfigError) as caught, lock(RunFolder(tmp_path)):
            pass
        for words in (f"process {process.pid}", held["started"], f"kill {process.pid}", "--output_dir"):
            assert words in str(caught.value)
        assert read(tmp_path / "run.lock") == held
    finally:
        process.communicate("")
    assert not (tmp_path / "run.lock").exists()
    with lock(RunFolder(tmp_path)):
        pass


def test_a_killed_runs_lock_is_taken_over(tmp_path):
    process = start(HOLD, tmp_path)
    process.kill()
    process.communicate()
    said = []
    with lock(RunFolder(tmp_path), said.append):
        assert read(tmp_path / "run.lock")["pid"] == os.getpid()
    assert len(said) == 1 and f"process {process.pid}" in said[0]
    assert not list(tmp_path.iterdir())


def test_another_process_with_the_old_number(tmp_path):
    other = psutil.Process(os.getppid())
    held = {"pid": other.pid, "host": os.uname().nodename, "started": "then", "create_time": other.create_time() - 3600}
    (tmp_path / "run.lock").write_text(json.dumps(held))
    with lock(RunFolder(tmp_path), lambda line: None):
        pass
    (tmp_path / "run.lock").write_text(json.dumps(held | {"create_time": other.create_time()}))
    with pytest.raises(ConfigError, match=f"process {other.pid}"), lock(RunFolder(tmp_path)):
        pass


def test_another_hosts_lock_is_not_judged(tmp_path):
    held = {"pid": 1, "host": "elsewhere", "started": "2026-11-24T09:00:00+00:00", "create_time": 1.0}
    (tmp_path / "run.lock").write_text(json.dumps(held))
    with (
        pytest.raises(
            ConfigError, match=rf"on elsewhere, started 2026.*delete {re.escape(str(tmp_path / 'run.lock'))}"
        ),
        lock(RunFolder(tmp_path)),
    ):
        pass
    assert read(tmp_path / "run.lock") == held


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_was_left_by_a_kill(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    with lock(RunFolder(tmp_path), lambda line: None):
        assert read(tmp_path / "run.lock")["pid"] == os.getpid()


def test_of_many_at_once_one_gets_the_stale_lock(tmp_path):
    dead = {"pid": 2**22 + 1, "host": os.uname().nodename, "started": "then", "create_time": 1.0}
    for _ in range(8):
        (tmp_path / "run.lock").write_text(json.dumps(dead))
        together, inside, refused = threading.Barrier(4), [], []

        def contend(together=together, inside=inside, refused=refused):
            together.wait()
            try:
                with lock(RunFolder(tmp_path), lambda line: None):
                    inside.append(1)
                    while len(inside) + len(refused) < 4:
                        time.sleep(0.001)
            except ConfigError:
                refused.append(1)

        threads = [threading.Thread(target=contend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(inside), len(refused)) == (1, 3)


def test_the_lock_is_released_after_an_error_and_leaves_no_folder(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    with pytest.raises(ZeroDivisionError), lock(folder):
        assert folder.path.is_dir()
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with lock(folder):
        (folder / "x").touch()
        with pytest.raises(ConfigError), lock(folder):  # not even by the same process
            pass
    assert list(folder.path.iterdir()) == [folder / "x"]


def test_outcome_of_a_run_that_finished(tmp_path):
    with outcome(RunFolder(tmp_path)):
        pass
    found = read(tmp_path / "outcome.json")
    assert (found["status"], found["error"]) == ("finished", None)
    assert found["started"] <= found["ended"]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("boom"), "failed", "ValueError: boom"),
        (KeyboardInterrupt(), "interrupted", None),
        (Terminated(), "interrupted", None),
    ],
)
def test_outcome_of_a_run_that_did_not(tmp_path, error, status, text, capsys):
    def report():
        assert read(tmp_path / "outcome.json")["status"] == status
        raise OSError("no space for the report")

    with pytest.raises(type(error)), outcome(RunFolder(tmp_path), report):
        raise error
    found = read(tmp_path / "outcome.json")
    assert (found["status"], found["error"]) == (status, text)
    assert "no space for the report" in capsys.readouterr().err


def test_sigterm_is_a_kind_of_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, terminate_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert exit_status(caught.value) == 143 and exit_status(KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_sigterm_stays_as_it_is():
    before, problems = signal.getsignal(signal.SIGTERM), []

    def enter():
        try:
            with terminate_as_interrupt():
                assert signal.getsignal(signal.SIGTERM) == before
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not problems


RUN = """
    import os, signal, sys, time
    from pathlib import Path
    from ptuning.runs import RunFolder, end_suddenly, exit_status, lock, outcome, terminate_as_interrupt

    folder, how = RunFolder(sys.argv[1]), sys.argv[2]
    def launcher(number, frame):
        end_suddenly("the launcher sent SIGTERM")
        os._exit(143)
    def report():
        time.sleep(0.5)
        (folder / "report.html").write_text("page")
    try:
        with terminate_as_interrupt():
            if how == "launcher":
                signal.signal(signal.SIGTERM, launcher)
            with lock(folder), outcome(folder, report):
                print("ready", flush=True)
                time.sleep(60)
    except KeyboardInterrupt as interrupt:
        sys.exit(exit_status(interrupt))
"""


@pytest.mark.parametrize(("how", "error"), [("alone", None), ("launcher", "the launcher sent SIGTERM")])
def test_sigterm_leaves_outcome_and_report_and_no_lock(tmp_path, how, error):
    process = start(RUN, tmp_path, how)
    process.terminate()
    if how == "alone":  # impatient: the second one must not cut off the report
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    found = read(tmp_path / "outcome.json")
    assert (found["status"], found["error"]) == ("interrupted", error)
    assert (tmp_path / "report.html").read_text() == "page" and not (tmp_path / "run.lock").exists()


# --- is a run going on? ---------------------------------------------------------------------------------------------------


def test_a_run_is_going_on_until_its_outcome_is_there(tmp_path):
    folder = RunFolder(tmp_path)
    assert running_since(folder) is None
    (tmp_path / "outcome.json").write_text("{}")  # an earlier run's
    os.utime(tmp_path / "outcome.json", (1, 1))
    with lock(folder):
        assert running_since(folder) == read(tmp_path / "run.lock")["started"]
        with outcome(folder, then=lambda: ended.append(running_since(folder))):
            ended = [running_since(folder)]
        assert ended[0] is not None and ended[1] is None  # the report of the end is written inside the lock
    assert running_since(folder) is None


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"pid": 2**22 + 1}, {"create_time": 1.0}])
def test_a_lock_that_was_left_is_no_run(tmp_path, change):
    with lock(RunFolder(tmp_path)):
        left = read(tmp_path / "run.lock")
    (tmp_path / "run.lock").write_text(json.dumps(left))
    assert running_since(RunFolder(tmp_path)) == left["started"]
    (tmp_path / "run.lock").write_text(json.dumps(left | change))
    assert running_since(RunFolder(tmp_path)) is None
