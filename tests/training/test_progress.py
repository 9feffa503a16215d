"""The report of a run that goes on: when it is written, and that nothing ends by it."""

from types import SimpleNamespace

import pytest

from ptuning.training import progress
from ptuning.training.progress import LiveReport

FIRST, OTHER = (SimpleNamespace(is_world_process_zero=zero) for zero in (True, False))


@pytest.fixture
def clock(monkeypatch):
    """The time that the module sees; set `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def written_at(clock, takes: float, times: list[float], state=FIRST) -> list[float]:
    found = []

    def write():
        found.append(clock.now)
        clock.now += takes

    live = LiveReport(write)
    for now in times:
        clock.now = now
        live.on_log(None, state, None, logs={})
    return found


def test_every_logging_but_not_every_second(clock):
    assert written_at(clock, 0.01, [1000, 1001, 1004, 1006, 1007, 1020]) == [1000, 1006, 1020]


def test_a_report_that_takes_long_comes_seldom(clock):
    assert written_at(clock, 2.0, [1000, 1010, 1040, 1053, 1060]) == [1000, 1053]  # 4 % of the time


def test_only_the_first_process_writes(clock):
    assert written_at(clock, 0.01, [1000, 1020], OTHER) == []


def test_what_goes_wrong_is_said_once(clock, capsys):
    calls = []

    def write():
        calls.append(1)
        raise OSError("No space left on device")

    live = LiveReport(write)
    for clock.now in (1000, 2000, 3000):
        live.on_log(None, FIRST, None)
    assert len(calls) == 1
    assert capsys.readouterr().err.count("note: no report is written while the run goes on: OSError") == 1


def test_it_can_be_written_between(clock):
    found = []
    live = LiveReport(lambda: found.append(clock.now))
    live.write()
    live.write()
    assert len(found) == 2
