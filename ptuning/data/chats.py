"""Rows that hold a whole conversation as a list of messages: ShareGPT's `conversations` and OpenAI's `messages`.

One conversation is one record: the last question and its answer, with the turns before them as history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ptuning.data.columns import absent_fault
from ptuning.data.problems import described
from ptuning.data.record import Record
from ptuning.data.rows import Row
from ptuning.data.values import Fault, optional_text_fault, text_fault

_SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_KEYS = (("from", "value"), ("role", "content"))  # both are met under both names of the list


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages in `column`. A system text may come as the first message or in the row's own `system` column.

    Args:
        column: conversations or messages.
        title: of the format, for people.
    """

    column: str
    title: str

    def __str__(self) -> str:
        return f"{self.title} {self.column}"

    @property
    def needed(self) -> list[tuple[str, str]]:
        return [("--data_format", self.column)]

    @property
    def json_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, row: Row, source: str) -> Record | list[tuple[str, Fault]]:
        if self.column not in row:
            return [(self.column, absent_fault(row))]
        if fault := optional_text_fault(row.get("system")):
            return [("system", fault)]
        turns = _turns(row[self.column])
        if isinstance(turns, Fault):
            return [(self.column, turns)]
        system = cast("str | None", row.get("system"))
        system = system if system and system.strip() else None
        if turns[0][0] == "system":
            if system is not None:
                fix = "keep one of the two"
                return [("system", Fault("the row has a system text, and a system message in its conversation", fix))]
            text = turns.pop(0)[1]
            system = text if text.strip() else None
        if fault := _order_fault(turns, first=len(cast(list, row[self.column])) - len(turns) + 1):
            return [(self.column, fault)]
        texts = [text for _, text in turns]
        pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
        (prompt, response), history = pairs[-1], pairs[:-1]
        return Record(prompt, response, history, source, system)


SHAREGPT = Chat("conversations", "ShareGPT")
OPENAI = Chat("messages", "OpenAI")


def _turns(value: object) -> list[tuple[str, str]] | Fault:
    """(speaker, text) of each message, the speaker being user, assistant or system."""
    write = 'write it as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(value, list):
        return Fault(f"is {described(value)}, not a list of messages", write)
    if not value:
        return Fault("is an empty list", "write at least one question and its answer, or delete the row")
    turns = []
    for number, message in enumerate(value, start=1):
        keys = next((pair for pair in _KEYS if isinstance(message, dict) and pair[0] in message), None)
        if keys is None:
            return Fault(f"message {number} is {described(message)}, without from or role", write)
        role, text = message[keys[0]], message.get(keys[1])
        speaker = _SPEAKERS.get(role) if isinstance(role, str) else None
        if speaker is None:
            problem = f"the {keys[0]} of message {number} is {described(role)}"
            fix = f"use {'human, gpt' if keys[0] == 'from' else 'user, assistant'} or system, or delete the row"
            return Fault(problem, fix)
        if keys[1] not in message:
            return Fault(f"message {number} has no {keys[1]}", "write its text or delete the row")
        fault = optional_text_fault(text) if speaker == "system" else text_fault(text)
        if fault:
            return Fault(f"the {keys[1]} of message {number} {fault.problem}", fault.fix)
        turns.append((speaker, text or ""))
    return turns


def _order_fault(turns: list[tuple[str, str]], first: int) -> Fault | None:
    """None where user and assistant take turns and the assistant has the last word.

    Args:
        turns: without a leading system message.
        first: the number that turns[0] has in the row's list.
    """
    delete = "or delete the row"
    if not turns:
        return Fault("holds a system message only", f"add a question and its answer, {delete}")
    for index, (speaker, _) in enumerate(turns):
        number = first + index
        if speaker == "system":
            return Fault(f"message {number} is a system message", f"put it first, once, {delete}")
        if speaker != ("user", "assistant")[index % 2]:
            if index == 0:
                return Fault(f"message {number}, the first, is the assistant's", f"start with a question, {delete}")
            fix = f"join them into one message, {delete}"
            return Fault(f"messages {number - 1} and {number} are both the {speaker}'s", fix)
    if turns[-1][0] == "user":
        number = first + len(turns) - 1
        return Fault(f"message {number}, the last, is the user's", "add the answer, or delete that message")
    return None
