"""A conversation as plain values, and what can be done with it: edit, send, download. Nothing is changed in place."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

SIDES = ("a", "b")  # the left model, and the right one where two are compared


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    Attributes:
        text: the answer; empty where none came.
        model: who gave it.
        cut: "" for a whole answer, else why it is not: "stopped", "length" or "problem".
        edited: whether a person rewrote it.
        dropped: old turns that the server left out for it.
        problem: kind and fields of the ApiProblem that ended it.
    """

    text: str
    model: str
    cut: str = ""
    edited: bool = False
    dropped: int = 0
    problem: tuple[str, dict] | None = None

    @property
    def is_good(self) -> bool:
        """Whether it can serve as an example to train on."""
        return bool(self.text.strip()) and (self.edited or not self.cut)


@dataclass(frozen=True)
class Turn:
    """A question and the answers to it, by side."""

    question: str
    replies: dict[str, Reply] = field(default_factory=dict)

    def seen_by(self, side: str) -> Reply | None:
        """The answer that the side's model sees in its history: its own, else the left one."""
        return self.replies.get(side) or self.replies.get(SIDES[0])


Turns = Sequence[Turn]


def pairs(turns: Turns, side: str) -> list[list[str]]:
    """The [question, answer] pairs that the side's model sees. Turns without an answer are no part of them."""
    seen = [(turn.question, turn.seen_by(side)) for turn in turns]
    return [[question, reply.text] for question, reply in seen if reply and reply.text.strip()]


def messages(turns: Turns, side: str, question: str, system: str = "") -> list[dict[str, str]]:
    """The messages that ask the question after these turns."""
    found = [{"role": "system", "content": system}] if system.strip() else []
    for asked, answered in pairs(turns, side):
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*found, {"role": "user", "content": question}]


def with_reply(turns: Turns, index: int, side: str, reply: Reply) -> list[Turn]:
    """The turns with one answer put in or replaced."""
    turn = turns[index]
    return [*turns[:index], replace(turn, replies={**turn.replies, side: reply}), *turns[index + 1 :]]


def edited(turns: Turns, index: int, side: str, text: str) -> list[Turn]:
    """The turns with an answer rewritten by a person. The same text is no edit."""
    reply = turns[index].replies[side]
    if reply.text == text:
        return list(turns)
    return with_reply(turns, index, side, replace(reply, text=text, edited=True, problem=None))


def with_question(turns: Turns, index: int, question: str) -> list[Turn]:
    """The turns with one question reworded, its answers left as they are."""
    return [*turns[:index], replace(turns[index], question=question), *turns[index + 1 :]]


def without(turns: Turns, index: int) -> list[Turn]:
    """The turns without one of them."""
    return [*turns[:index], *turns[index + 1 :]]


def training_rows(turns: Turns, side: str) -> list[dict]:
    """One row for each answer of the side that is whole or was edited, as training reads them.

    An answer that was stopped or cut off would teach the model to break off. It may still stand in the history of a
    later row, for the later answer was given with it.
    """
    return [
        {"prompt": turn.question, "response": turn.replies[side].text, "history": pairs(turns[:index], side)}
        for index, turn in enumerate(turns)
        if side in turn.replies and turn.replies[side].is_good
    ]


def as_json_lines(rows: Sequence[dict]) -> str:
    """Rows for `--prompt_column prompt --response_column response --history_column history`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_json(turns: Turns, system: str, settings: dict) -> str:
    """The whole conversation with the settings in force, for people and other programs."""
    told = [
        {
            "question": turn.question,
            "answers": [
                {
                    "side": side,
                    "model": reply.model,
                    "text": reply.text,
                    "state": "edited" if reply.edited else reply.cut or "whole",
                }
                for side, reply in sorted(turn.replies.items())
            ],
        }
        for turn in turns
    ]
    return json.dumps({"system": system, "settings": settings, "turns": told}, ensure_ascii=False, indent=2) + "\n"
