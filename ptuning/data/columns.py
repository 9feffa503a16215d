"""Rows with a column for the question, one for the answer, and maybe one for the turns before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ptuning.data.problems import listed
from ptuning.data.record import Record
from ptuning.data.rows import Row
from ptuning.data.values import Fault, history_fault, history_pairs, text_fault
from ptuning.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a file's columns. A response or history of None is not read.

    Raises:
        ConfigError: a name is empty, or two are the same.
    """

    prompt: str
    response: str | None
    history: str | None = None

    def __post_init__(self) -> None:
        flag_of: dict[str, str] = {}
        for flag, name in self.needed:
            if not name:
                raise ConfigError(f"{flag} is {name!r}: give the name of a column")
            if name in flag_of:
                raise ConfigError(f"{flag_of[name]} and {flag} are both {name!r}: name two different columns")
            flag_of[name] = flag

    def __str__(self) -> str:
        pairs = (("prompt", self.prompt), ("response", self.response), ("history", self.history))
        return "columns " + ", ".join(f"{kind} {name!r}" for kind, name in pairs if name is not None)

    @property
    def needed(self) -> list[tuple[str, str]]:
        """The columns to read as (command-line flag, column name)."""
        pairs = (("prompt", self.prompt), ("response", self.response), ("history", self.history))
        return [(f"--{kind}_column", name) for kind, name in pairs if name is not None]

    @property
    def json_columns(self) -> tuple[str, ...]:
        return () if self.history is None else (self.history,)

    def read(self, row: Row, source: str) -> Record | list[tuple[str, Fault]]:
        """A history that is null, blank or absent is empty."""
        faults = []
        for name in (self.prompt, self.response):
            if name is None:
                continue
            if name not in row:
                faults.append((name, absent_fault(row)))
            elif fault := text_fault(row[name]):
                faults.append((name, fault))
        if self.history is not None and (fault := history_fault(row.get(self.history))):
            faults.append((self.history, fault))
        if faults:
            return faults
        return Record(  # its values are known to be text now
            prompt=cast(str, row[self.prompt]),
            response=None if self.response is None else cast(str, row[self.response]),
            history=() if self.history is None else history_pairs(row.get(self.history)),
            source=source,
        )


def absent_fault(row: Row) -> Fault:
    """A row without a column that other rows have."""
    return Fault(f"this row has no such column, it has {listed(list(row))}", "add it or delete the row")
