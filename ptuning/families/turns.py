"""What is said in a dialogue besides plain questions and answers: calls of tools, what they return, and the tools on offer.

Each is text that carries its parts. A template without roles for tools writes the text as it is; one with roles reads the parts.
Source of the form of such data: THUDM/ChatGLM3 `finetune_demo`, and OpenAI's messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["user", "observation", "assistant"]

# What stands before the tools where nothing else is said; ChatGLM3 was trained with it.
OFFER = "Answer the following questions as best as you can. You have access to the following tools:"


@dataclass(frozen=True, slots=True)
class Part:
    """One message.

    Args:
        role: who says it; an observation is what a tool returned.
        text: its words; of a call its arguments, as JSON.
        call: the tool that the assistant calls; empty where it speaks.
    """

    role: Side
    text: str
    call: str = ""

    def __str__(self) -> str:
        """As plain text."""
        if self.call:
            return f"调用工具：{self.call}({self.text})"
        return f"工具返回：{self.text}" if self.role == "observation" else self.text


class Turn(str):
    """One side's messages in a row, among them calls of tools or what they returned."""

    __slots__ = ("parts",)
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> str:
        """A turn, or plain text where nothing in it is about tools."""
        text = "\n".join(said for part in parts if (said := str(part)))
        if all(part.role != "observation" and not part.call for part in parts):
            return text
        turn = cls(text)
        turn.parts = tuple(parts)
        return turn

    def __getnewargs__(self) -> tuple[str]:  # a copy has its parts too
        return (str(self),)


class Offer(str):
    """A system text and the tools that the assistant may call; as plain text both, as ChatGLM3 writes them."""

    __slots__ = ("said", "tools")
    said: str
    tools: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, said: str, tools: Sequence[Mapping[str, Any]]) -> str:
        """A system text, plain where there are no tools.

        Args:
            said: the text; empty: the usual one.
            tools: descriptions of functions, bare or as OpenAI wraps them.
        """
        if not tools:
            return said
        functions = tuple(function_in(tool) for tool in tools)
        offer = cls(f"{said or OFFER}\n{json.dumps(functions, indent=4, ensure_ascii=False)}")
        offer.said, offer.tools = said, functions
        return offer

    def __getnewargs__(self) -> tuple[str]:
        return (str(self),)


def function_in(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's description, out of the object that OpenAI puts around it."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def parts_of(text: str, role: Side) -> tuple[Part, ...]:
    """The messages of a turn; plain text is one.

    Args:
        role: who says a plain text.
    """
    return text.parts if isinstance(text, Turn) else (Part(role, text),)


def arguments_text(value: object) -> str:
    """Arguments of a call as JSON; text is taken for JSON already."""
    return value if isinstance(value, str) else json.dumps({} if value is None else value, ensure_ascii=False)
