"""How much of a prompt goes with the running rows' steps, on a clock that goes on by what a step would take."""

import random

import pytest

from ptuning.generation.pace import PAUSE, Pace, evenly


class Clock:
    """Seconds that pass when `take` says so, in steps that `pace` measures."""

    def __init__(self, pause: float | None = 2.0, piece_tokens: int = 1000):
        self.now = 0.0
        self.pace = Pace(piece_tokens, pause, lambda: self.now)

    def take(self, seconds: float, rows: bool, prompt_tokens: int = 0) -> None:
        with self.pace.measured(rows, prompt_tokens):
            self.now += seconds

    def piece(self) -> int:
        return self.pace.tokens(rows_run=True)


def test_a_piece_takes_what_the_rows_leave_of_their_usual_steps():
    clock = Clock()
    assert clock.pace.tokens(rows_run=False) == 1000 and not clock.pace.rows_turn()
    assert clock.piece() == 64  # nothing is known yet
    clock.take(0.1, False, 100)
    assert clock.pace.rows_turn()
    clock.take(0.05, True)
    clock.take(0.05, True)
    assert not clock.pace.rows_turn() and clock.piece() == 100  # twice 50 ms at 1 ms a token
    clock.take(0.15, True, 100)
    assert clock.piece() == pytest.approx(100, abs=1)
    assert clock.pace.tokens(True, spent=0.04) == pytest.approx(60, abs=1)  # on room for them
    with pytest.raises(MemoryError), clock.pace.measured(False, 100):
        raise MemoryError
    assert clock.piece() == pytest.approx(100, abs=1)
    never = Pace(1000, None)
    assert not never.rows_turn() and never.tokens(rows_run=True) == 1000


def test_rows_have_a_step_to_themselves_now_and_then():
    clock = Clock()
    clock.take(0.1, False, 100)
    clock.take(0.05, True)
    turns = []
    for _ in range(100):
        turns.append(clock.pace.rows_turn())
        clock.take(0.05, True, 0) if turns[-1] else clock.take(0.15, True, 100)
    assert turns.count(True) == 3 and turns.index(True) == 31


@pytest.mark.parametrize("first", [(3, 0.02), (960, 1.0), (2000, 0.6)], ids=["dear", "right", "cheap"])
def test_no_step_takes_much_longer_than_the_usual_ones_allow(first):
    """Rows join with long pasts, later pieces of a prompt are dearer, and prompts alone have said something else of a token."""
    draw, clock = random.Random(0), Clock(PAUSE, 2048)
    clock.take(first[1], False, first[0])
    for _ in range(20):
        clock.take(0.04, True)
    taken, joined = [], []
    for _ in range(8):
        start = 0
        while start < 1400:
            rows = 0.04 + 0.003 * len(joined)
            joined = [left - 1 for left in joined if left > 1]
            piece = 0 if clock.pace.rows_turn() else evenly(1400 - start, clock.piece())
            about = draw.uniform(0.95, 1.05)
            seconds = about * (rows + (0.003 + 0.001 * piece * (1 + 0.3 * start / 1400) if piece else 0))
            clock.take(seconds, True, piece)
            start += piece
            taken.append((seconds, piece))
        joined.append(48)
    steady = [seconds for seconds, piece in taken[40:] if piece]
    assert max(seconds for seconds, _ in taken[5:]) < 3 * 0.04
    assert sum(steady) / len(steady) > 0.9 * (1 + PAUSE) * 0.04  # and little of the time is left unused


def test_many_long_answers_dont_shut_prompts_out():
    """When their steps take far more than was usual, prompts still get half of that; in time it is what is usual."""
    clock = Clock()
    clock.take(0.1, False, 100)
    for _ in range(3):
        clock.take(0.05, True)
    pieces, rows = [], 0.05
    while clock.now < 1500:
        rows = min(rows + 0.01, 0.4)
        piece = 0 if clock.pace.rows_turn() else clock.piece()
        clock.take(rows + 0.001 * piece, True, piece)
        pieces.append(piece)
    assert min(piece for piece in pieces[50:] if piece) > 120 and pieces[200] < 210
    assert pieces[-1] > 500


def test_a_prompt_is_cut_into_even_pieces():
    assert evenly(1400, 64) == 64 and evenly(1400 - 21 * 64, 64) == 56
    assert evenly(70, 64) == 35 and evenly(64, 64) == 64 and evenly(3, 64) == 3
