"""How large the batch may be: less after memory ran out, and step by step more again when it has gone well since."""

from collections.abc import Callable

import torch

from ptuning.messages import message

_CALM = 256  # steps without lack of memory, after which the batch may be larger again
_MOST_CALM = 64 * _CALM
_LARGER = 1.25  # times


class Budget:
    """Tokens of the batch, rows times columns, at most.

    Memory that another process needed for a while comes back. Where it doesn't, the batch runs out at the same size again;
    then each try to grow comes twice as late as the one before.

    Args:
        tokens: while memory suffices.
        notify: gets a sentence when the batch is made smaller, and one when it is whole again.
    """

    def __init__(self, tokens: int, notify: Callable[[str], None]):
        self.most = self.tokens = tokens
        self.notify = notify
        self._calm, self._steps, self._grew = _CALM, 0, False

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the batch may have so many rows of so many columns. A single row always may."""
        return rows <= 1 or rows * columns <= self.tokens

    def ran_out(self, rows: int, columns: int) -> None:
        """Halves the batch, from the size at which memory ran out."""
        if self._grew:
            self._calm = min(2 * self._calm, _MOST_CALM)
        self.tokens = max(min(self.tokens, rows * columns) // 2, 1)
        self._steps, self._grew = 0, False
        self.notify(ran_out(rows, self.tokens))

    def went_well(self) -> None:
        """A step had enough memory."""
        if self.tokens == self.most:
            return
        self._steps += 1
        if self._steps < self._calm:
            return
        self.tokens = min(int(self.tokens * _LARGER) + 1, self.most)
        self._steps, self._grew = 0, True
        if self.tokens == self.most:
            self.notify(message("memory_is_back", batch_tokens=self.most))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a forward call says that memory ran out, on an accelerator or on the CPU."""
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def ran_out(rows: int, batch_tokens: int) -> str:
    """The sentence for the user: with how many rows it happened, and the new bound."""
    return message("memory_ran_out", rows=rows, batch_tokens=batch_tokens)
