"""Rate and memory of training, for the log."""

import contextlib
import time
from collections.abc import Iterator

import torch

from ptuning.training.machine import current_rss


class Throughput:
    """Counts what all processes train, without the time of evaluations and saving.

    Args:
        processes: that each train a batch like this one's.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self._reset()

    def count(self, input_ids: torch.Tensor, pad_token_id: int) -> None:
        """A batch (B, S) is about to be trained on."""
        self.rows += len(input_ids)
        self.tokens += int((input_ids != pad_token_id).sum())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the clock stands still."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def report(self) -> dict[str, float]:
        """samples_per_second, tokens_per_second (prompts and answers, no padding) and memory_gib since the last report.

        Memory is the accelerator's peak, or this process's resident memory now.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else current_rss()
        values = {
            "samples_per_second": round(self.processes * self.rows / seconds, 3),
            "tokens_per_second": round(self.processes * self.tokens / seconds, 1),
            "memory_gib": round(memory / 2**30, 3),
        }
        self._reset()
        return values

    def _reset(self) -> None:
        self.rows, self.tokens, self._started = 0, 0, time.perf_counter()
