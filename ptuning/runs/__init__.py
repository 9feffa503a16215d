"""The folder of a run: files, record, lock, outcome, and the contract for resuming."""

from ptuning.runs.folder import RunFolder
from ptuning.runs.lifetime import (
    end_suddenly,
    exit_status,
    lock,
    outcome,
    running_since,
    terminate_as_interrupt,
)
from ptuning.runs.record import RunRecord

__all__ = [
    "RunFolder",
    "RunRecord",
    "end_suddenly",
    "exit_status",
    "lock",
    "outcome",
    "running_since",
    "terminate_as_interrupt",
]
