"""One example, whatever the format of the file it came from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from ptuning.data.rows import Row
from ptuning.data.values import Fault


@dataclass(frozen=True, slots=True)
class Record:
    """One example to train on or to answer."""

    prompt: str
    response: str | None  # None only where the response column was not asked for: prediction without references
    history: tuple[tuple[str, str], ...]  # past (question, answer) turns, oldest first
    source: str  # "data/train.json:17", the line where the row starts
    system: str | None = None  # text in front of the first turn


class Shape(Protocol):
    """How the rows of a file hold records. `str()` names the columns for people."""

    @property
    def json_columns(self) -> Collection[str]:
        """Columns whose cells are JSON where the file is CSV."""

    @property
    def needed(self) -> list[tuple[str, str]]:
        """(command-line flag, column) pairs; a column that is in no row at all means that the flag is wrong."""

    def read(self, row: Row, source: str) -> Record | list[tuple[str, Fault]]:
        """The row's record, or what is wrong with it as (column, fault) pairs."""
