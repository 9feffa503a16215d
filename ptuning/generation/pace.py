"""How many prompt tokens are computed at once, and whose turn it is: prompts', or that of the rows that are being answered."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PIECE_TOKENS = 2048  # of a prompt: its attention mask has as many lines, however long the prompt is
_LEAST, _FIRST = 16, 256  # tokens of a piece; where nothing has been measured yet
_NEWEST = 0.3  # weight of the latest measurement


class Pace:
    """Measures steps, and lets prompts and running rows take turns.

    Args:
        piece_tokens: prompt tokens of one step at most, padding included.
        pause: where rows are being answered, prompt steps take turns with theirs, and one takes about as long as this many
            of theirs, so that no answer stands still while many prompts arrive. None: prompts first, which gives the
            most tokens a second.
        clock: in seconds.
    """

    def __init__(self, piece_tokens: int, pause: float | None, clock: Callable[[], float] = time.perf_counter):
        self.piece_tokens, self.pause, self._clock = piece_tokens, pause, clock
        self._prompts_had_turn = False
        self._row_step = self._prompt_token = 0.0  # seconds, 0: not measured yet

    def rows_turn(self) -> bool:
        """Whether running rows come before prompts that wait."""
        return self.pause is not None and self._prompts_had_turn

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
    def measured(self, prompt_tokens: int | None) -> Iterator[None]:
        """Around a step of so many prompt tokens, or of the running rows' next tokens (None). One that fails doesn't count."""
        started = self._clock()
        yield
        seconds = self._clock() - started
        self._prompts_had_turn = prompt_tokens is not None
        if prompt_tokens is None:
            self._row_step = _moved(self._row_step, seconds)
        else:
            self._prompt_token = _moved(self._prompt_token, seconds / prompt_tokens)


def _moved(before: float, now: float) -> float:
    return now if not before else before + _NEWEST * (now - before)
