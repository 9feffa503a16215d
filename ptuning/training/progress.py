"""What can be seen of a run while it trains: rate and memory, the log as it grows, and its curve as a picture."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from ptuning.messages import message, note
from ptuning.runs import RunFolder
from ptuning.runs.files import write_atomically
from ptuning.runs.folder import CURVE
from ptuning.training.machine import current_rss


class Throughput:
    """Counts what all processes train, without the time of evaluations and saving.

    Args:
        processes: that each train a batch like this one's.
        takers: of them, those that train on rows of their own.
    """

    def __init__(self, processes: int, takers: int):
        self.processes, self.takers = processes, takers
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
            "samples_per_second": round(self.takers * self.rows / seconds, 3),
            "tokens_per_second": round(self.processes * self.tokens / seconds, 1),
            "memory_gib": round(memory / 2**30, 3),
        }
        self._reset()
        return values

    def _reset(self) -> None:
        self.rows, self.tokens, self._started = 0, 0, time.perf_counter()


class LossCurve(TrainerCallback):
    """Writes the log as JSON lines while training runs and draws loss_curve.png at the end, also after an error."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.folder.write_log(state.log_history)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_curve(self.folder / CURVE, state.log_history)


class LiveReport(TrainerCallback):
    """Writes the report as training goes on: after each logging, unless that would cost more than a small share of the time.

    Args:
        write: the report.
    """

    SECONDS = 5.0  # between two of them at least
    SHARE = 0.04  # of the time; measured: a report takes 0.6 s, of 3,000 steps too

    def __init__(self, write: Callable[[], object]):
        self._write, self._next = write, 0.0

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes it now. What goes wrong is a note, once: no run should end by it."""
        started = time.monotonic()
        try:
            self._write()
        except Exception as problem:
            print(note(message("no_live_report", problem=repr(problem))), file=sys.stderr)
            self._next = math.inf
            return
        now = time.monotonic()
        self._next = now + max(self.SECONDS, (now - started) / self.SHARE)


def draw_curve(path: Path, history: Sequence[dict]) -> None:
    """Training loss, eval loss and learning rate over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.09, right=0.89, bottom=0.11, top=0.97)
    axis = figure.subplots()
    for key, label in (("loss", "training loss"), ("eval_loss", "eval loss")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None)
    rates = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    if rates:
        right = axis.twinx()
        right.plot(*zip(*rates, strict=True), color="grey", alpha=0.5, linestyle="--")
        right.set_ylabel("learning rate (dashed)")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    if axis.has_data():
        axis.legend(loc="upper right")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
