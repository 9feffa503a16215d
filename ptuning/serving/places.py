"""How many answers a backend takes at a time, how many it has, and how long they usually last."""

import threading

from ptuning.serving.backend import Busy

_NEWEST = 0.1  # weight of the latest answer's time


class Places:
    """Counts answers from the moment they are asked for until they end. For any thread.

    Args:
        together: answers that are computed at a time.
        waiting: that may wait beside them.
        options: what sets these numbers, for the message.
    """

    def __init__(self, together: int, waiting: int, options: str):
        self.together, self.capacity, self.options = together, together + waiting, options
        self._change = threading.Condition()  # guards what follows
        self.live = 0
        self._seconds = 1.0  # an answer's usual time

    def take(self, count: int) -> None:
        """Places for so many answers, for all of them or none.

        Raises:
            Busy: there aren't so many.
        """
        with self._change:
            if self.live + count > self.capacity:
                raise Busy(
                    f"{self.live} answers run or wait and {count} more are asked for, the limit is {self.capacity} "
                    f"({self.options}); ask again later",
                    retry_after=int(min(max(self._seconds * self.live / self.together / 2, 1), 60)),
                )
            self.live += count

    def give_back(self, seconds: float) -> None:
        """One answer has ended, so many seconds after it was asked for."""
        with self._change:
            self.live -= 1
            self._seconds += _NEWEST * (seconds - self._seconds)
            self._change.notify_all()

    def wait_until_free(self, seconds: float) -> bool:
        """Waits until no answer is left, so long at most. Returns whether none is."""
        with self._change:
            return self._change.wait_for(lambda: not self.live, timeout=seconds)
