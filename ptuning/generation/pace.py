"""How many prompt tokens are computed at once, and whose turn it is: prompts', or that of the rows that are being answered."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PIECE_TOKENS = 2048  # of a prompt: its attention mask has as many lines, however long the prompt is
PAUSE = 1.2  # of answers that people read as they come; steps that take 2.2 times as long as without prompts
_LEAST = 32  # tokens of a piece; fewer cost the step nearly as much
_FIRST = 256  # where nothing has been measured yet
_NEWEST = 0.3  # weight of the latest measurement
_MEASURE_EVERY = 7  # steps with prompts until the running rows have one to themselves


class Pace:
    """Measures steps, and lets prompts and running rows take turns, or steps together.

    Args:
        piece_tokens: prompt tokens of one step at most, padding included.
        pause: where rows are being answered, no step's prompts take much longer than this many steps of these rows alone, so that
            no answer stands still while many prompts arrive; two steps with prompts alone don't follow each other. None: prompts
            first, which gives the most tokens a second.
        clock: in seconds.
    """

    def __init__(self, piece_tokens: int, pause: float | None, clock: Callable[[], float] = time.perf_counter):
        self.piece_tokens, self.pause, self._clock = piece_tokens, pause, clock
        self._without_rows = self._with_prompts = 0  # latest steps, one after the other
        self._row_step = self._prompt_token = 0.0  # seconds, 0: not measured yet

    def rows_turn(self) -> bool:
        """Whether running rows have a step to themselves before prompts that wait; now and then they have, to measure it."""
        return self.pause is not None and (self._without_rows > 0 or self._with_prompts >= _MEASURE_EVERY)

    def tokens(self, rows_run: bool) -> int:
        """Prompt tokens of the next step at most.

        Args:
            rows_run: rows are being answered meanwhile.
        """
        if self.pause is None or not rows_run:
            return self.piece_tokens
        if not (self._row_step and self._prompt_token):
            return min(_FIRST, self.piece_tokens)
        return min(max(int(self.pause * self._row_step / self._prompt_token), _LEAST), self.piece_tokens)

    @contextmanager
    def measured(self, rows: bool, prompt_tokens: int) -> Iterator[None]:
        """Around a step of the running rows' next tokens, of prompts, or of both. One that fails doesn't count."""
        started = self._clock()
        yield
        seconds = self._clock() - started
        self._without_rows = 0 if rows else self._without_rows + 1
        self._with_prompts = self._with_prompts + 1 if prompt_tokens else 0
        if not prompt_tokens:
            self._row_step = _moved(self._row_step, seconds)
        else:
            alone = max(seconds - self._row_step, 0.1 * seconds) if rows else seconds
            self._prompt_token = _moved(self._prompt_token, alone / prompt_tokens)


def _moved(before: float, now: float) -> float:
    return now if not before else before + _NEWEST * (now - before)
