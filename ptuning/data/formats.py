"""The shapes that rows come in, and the record that each becomes. To add a format, write its class here and name it in FORMATS.

One conversation is one record: the last question and its answer, with the turns before them as history.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, cast

from ptuning.data.conversation import order_finding, tools_in, turns_of
from ptuning.data.problems import (
    Finding,
    history_finding,
    history_pairs,
    listed,
    optional_text_finding,
    text_finding,
)
from ptuning.data.source import Row
from ptuning.errors import ConfigError
from ptuning.families import Dialogue, Offer

Findings = list[tuple[str, Finding]]  # (column, what is wrong there)

_PAIRS = '[["question", "answer"]]'


@dataclass(frozen=True, slots=True)
class Record:
    """One example to train on or to answer, whatever the format of the file it came from."""

    prompt: str
    response: str | None  # None only where the response column was not asked for: prediction without references
    history: tuple[tuple[str, str], ...]  # past (question, answer) turns, oldest first
    source: str  # "data/train.json:17", the line where the row starts
    system: str | None = None  # text in front of the first turn, and the tools on offer

    def dialogue(self, source_prefix: str = "") -> Dialogue:
        """What a template writes.

        Args:
            source_prefix: text in front of everything.
        """
        return Dialogue(self.prompt, self.history, self.system, source_prefix, self.response)


class Shape(Protocol):
    """How the rows of a file hold records. `str()` names the columns for people."""

    @property
    def json_columns(self) -> Mapping[str, str]:
        """Columns whose cells are JSON where the file is CSV, each with an example of what it holds."""

    @property
    def needed(self) -> list[tuple[str, str]]:
        """(command-line flag, column) pairs; a column that is in no row at all means that the flag is wrong."""

    def read(self, row: Row, source: str) -> Record | Findings:
        """The row's record, or what is wrong with it."""


class Format(Shape, Protocol):
    """A shape whose columns have fixed names, so that it can be told from its rows."""

    owns_columns: ClassVar[bool]  # columns that look like a question and an answer of their own are this format's

    def fits(self, rows: Collection[Row]) -> bool:
        """Whether the first rows of a file look like it."""

    def unanswered(self) -> Format:
        """The same for rows to answer, which need hold no answers; those that are there are not used."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows with a column for the question, one for the answer, and maybe one for the turns before. A response or history of
    None is not read.

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
    def json_columns(self) -> dict[str, str]:
        return {} if self.history is None else {self.history: _PAIRS}

    def read(self, row: Row, source: str) -> Record | Findings:
        """A history that is null, blank or absent is empty."""
        findings = _texts(row, [name for name in (self.prompt, self.response) if name is not None])
        if self.history is not None and (found := history_finding(row.get(self.history))):
            findings.append((self.history, found))
        if findings:
            return findings
        return Record(  # its values are known to be text now
            prompt=cast(str, row[self.prompt]),
            response=None if self.response is None else cast(str, row[self.response]),
            history=() if self.history is None else history_pairs(row.get(self.history)),
            source=source,
        )


@dataclass(frozen=True, slots=True)
class Alpaca:
    """The names that stanford_alpaca gave; `history` and `system` are those of later collections. The question is the
    instruction, followed by a line break and the input where there is one."""

    references: bool = True
    owns_columns: ClassVar[bool] = True  # input and output
    json_columns: ClassVar[dict[str, str]] = {"history": _PAIRS}

    def __str__(self) -> str:
        return "Alpaca instruction, input, output"

    @property
    def needed(self) -> list[tuple[str, str]]:
        return [("--data_format", name) for name in ("instruction", "output")[: 2 if self.references else 1]]

    def unanswered(self) -> Alpaca:
        return replace(self, references=False)

    def fits(self, rows: Collection[Row]) -> bool:
        return all(any(name in row for row in rows) for _, name in self.needed)

    def read(self, row: Row, source: str) -> Record | Findings:
        findings = _texts(row, [name for _, name in self.needed])
        for name in ("input", "system"):
            if found := optional_text_finding(row.get(name)):
                findings.append((name, found))
        if found := history_finding(row.get("history")):
            findings.append(("history", found))
        if findings:
            return findings
        question, context = cast(str, row["instruction"]), cast("str | None", row.get("input"))
        return Record(
            prompt=f"{question}\n{context}" if context and context.strip() else question,
            response=cast(str, row["output"]) if self.references else None,
            history=history_pairs(row.get("history")),
            source=source,
            system=_system(row),
        )


@dataclass(frozen=True, slots=True)
class Chat:
    """Rows that hold a whole conversation as a list of messages in `column`. A system text may come as the first message or in
    the row's own `system` column; tools that are offered in the row's `tools`, or in that message's.

    Args:
        column: conversations or messages.
        title: of the format, for people.
        example: of the list.
    """

    column: str
    title: str
    example: str
    references: bool = True
    owns_columns: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.title} {self.column}"

    @property
    def needed(self) -> list[tuple[str, str]]:
        return [("--data_format", self.column)]

    @property
    def json_columns(self) -> dict[str, str]:
        return {self.column: self.example}

    def unanswered(self) -> Chat:
        return replace(self, references=False)

    def fits(self, rows: Collection[Row]) -> bool:
        return any(is_list(row.get(self.column)) for row in rows)

    def read(self, row: Row, source: str) -> Record | Findings:
        if self.column not in row:
            return [(self.column, _absent(row))]
        if found := optional_text_finding(row.get("system")):
            return [("system", found)]
        turns = turns_of(row[self.column])
        if isinstance(turns, Finding):
            return [(self.column, turns)]
        system, tools = _system(row), row.get("tools")
        if turns[0].speaker == "system":
            if system is not None:
                fix = "keep one of the two"
                return [("system", Finding("the row has a system text, and a system message in its conversation", fix))]
            text = turns.pop(0).text
            system = text if text.strip() else None
            tools = tools or cast(list, row[self.column])[0].get("tools")
        if found := order_finding(turns, self.references):
            return [(self.column, found)]
        if isinstance(offered := tools_in(tools), Finding):
            return [("tools", offered)]
        system = Offer.of(system or "", offered) or None
        texts = [said.text for said in turns]
        if turns[-1].speaker == "user":
            texts.append("")  # the answer that is asked for
        pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
        (prompt, response), history = pairs[-1], pairs[:-1]
        return Record(prompt, response if self.references else None, history, source, system)


FORMATS: dict[str, Format] = {
    "sharegpt": Chat("conversations", "ShareGPT", '[{"from": "human", "value": "…"}, …]'),
    "openai": Chat("messages", "OpenAI", '[{"role": "user", "content": "…"}, …]'),
    "alpaca": Alpaca(),
}


def is_list(value: object) -> bool:
    """Whether a value is a list, or a CSV cell that holds one."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _texts(row: Row, names: Collection[str]) -> Findings:
    """What is wrong with columns that must hold text."""
    findings = []
    for name in names:
        if name not in row:
            findings.append((name, _absent(row)))
        elif found := text_finding(row[name]):
            findings.append((name, found))
    return findings


def _absent(row: Row) -> Finding:
    """A row without a column that other rows have."""
    return Finding(f"this row has no such column, it has {listed(list(row))}", "add it or delete the row")


def _system(row: Row) -> str | None:
    system = cast("str | None", row.get("system"))
    return system if system and system.strip() else None
