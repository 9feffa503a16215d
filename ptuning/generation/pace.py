"""How many prompt tokens are computed at once, and whose turn it is: prompts', or that of the rows that are being answered."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PIECE_TOKENS = 2048  # of a prompt: its attention mask has as many lines, however long the prompt is
PAUSE = 1.5  # of answers that people read as they come: gaps of 2.5 usual steps, so that the largest stay near 3
_LEAST = 32  # tokens of a piece; fewer cost the step nearly as much
_FIRST = 64  # where nothing has been measured yet
_SHARE = 0.5  # of the rows' own time now: prompts get that at least, or many long answers would shut them out
_MEASURE_EVERY = 31  # steps with prompts until the running rows have one to themselves
_ROWS_LEFT = 0.5  # of a: steps that are shorter than that leaves mean that a prompt token is cheaper than was thought
_NEWEST = 0.5  # weight of the latest measurement
_USED_TO = 600.0  # seconds: in about this time the rows' own time beside prompts becomes the usual one


class Pace:
    """Measures steps, and lets prompts and running rows take turns, or steps together.

    A step is thought to take a + b p seconds with p prompt tokens: a from the rows' steps alone, b from what a piece has added to
    the last of these, or from prompts alone. What steps with pieces take more or less than that, from one to the next, counts as
    the rows': they grow and join, and whatever it is, the next piece is cut so that its step takes what it may.

    Args:
        piece_tokens: prompt tokens of one step at most, padding included.
        pause: where rows are being answered, how many of their usual steps a step may take longer for prompts, so that no answer
            stands still while many prompts arrive; two steps with prompts alone don't follow each other. Usual is what
            these rows took before prompts came: rows that join with long pasts make steps longer too, and whoever reads an
            answer waits for both. None: prompts first, which gives the most tokens a second.
        clock: in seconds.
    """

    def __init__(self, piece_tokens: int, pause: float | None, clock: Callable[[], float] = time.perf_counter):
        self.piece_tokens, self.pause, self.clock = piece_tokens, pause, clock
        self._without_rows = self._with_prompts = 0  # latest steps, one after the other
        self._alone = 0  # latest steps of the rows alone
        self._row_step = self._prompt_token = 0.0  # a and b, 0: not measured yet
        self._at_least = 0.0  # of a, until it is measured again
        self._usual = 0.0  # a where no prompt waits

    def rows_turn(self) -> bool:
        """Whether running rows have a step to themselves before prompts that wait; now and then they have, to measure it."""
        return self.pause is not None and (self._without_rows > 0 or self._with_prompts >= _MEASURE_EVERY)

    def tokens(self, rows_run: bool, spent: float = 0.0) -> int:
        """Prompt tokens of the next step at most.

        Args:
            rows_run: rows are being answered meanwhile.
            spent: seconds that the step has taken already, for room.
        """
        if self.pause is None or not rows_run:
            return self.piece_tokens
        if not (self._row_step and self._prompt_token):
            return min(_FIRST, self.piece_tokens)
        seconds = max((1 + self.pause) * self._usual - self._row_step - spent, _SHARE * self._row_step)
        return min(max(int(seconds / self._prompt_token), _LEAST), self.piece_tokens)

    @contextmanager
    def measured(self, rows: bool, prompt_tokens: int) -> Iterator[None]:
        """Around a step of the running rows' next tokens, of prompts, or of both. One that fails doesn't count."""
        started = self.clock()
        yield
        seconds = self.clock() - started
        if not rows:
            self._prompt_token = _moved(self._prompt_token, seconds / prompt_tokens)
        elif not prompt_tokens:
            self._row_step = _moved(self._row_step, seconds)
            self._at_least = _ROWS_LEFT * self._row_step
        else:
            row_step = self._row_step if self._alone else seconds - self._prompt_token * prompt_tokens
            if self._alone or row_step < self._at_least:
                row_step = max(row_step, self._at_least)
                added = max(seconds - row_step, 0.1 * seconds)
                self._prompt_token = _moved(self._prompt_token, added / prompt_tokens)
            self._row_step = _moved(self._row_step, row_step)
        calm = self._alone > 0 and rows and not prompt_tokens
        self._usual = _moved(self._usual, self._row_step, _NEWEST if calm else min(seconds / _USED_TO, 1.0))
        self._alone = self._alone + 1 if rows and not prompt_tokens else 0
        self._without_rows = 0 if rows else self._without_rows + 1
        self._with_prompts = self._with_prompts + 1 if prompt_tokens else 0


def evenly(tokens: int, most: int) -> int:
    """Of so many prompt tokens left, the next piece's, so that as few steps as can be are all of one size: a last piece of a few
    tokens would make the rows' step longer for nothing."""
    return -(-tokens // -(-tokens // most))


def _moved(before: float, now: float, weight: float = _NEWEST) -> float:
    return now if not before else before + weight * (now - before)
