"""A list of messages as turns: who speaks, in which of the forms that people write it, and what can be wrong with it.

Tools are in it in three forms: OpenAI's (`tool_calls`, role `tool`), ShareGPT's (`function_call`, `observation`), and that of
ChatGLM3's own fine-tuning (role `tool` with name, parameters and observation).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ptuning.data.problems import Finding, described, optional_text_finding, text_finding
from ptuning.families import Part, Turn, arguments_text

_SPEAKERS = {
    **{"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"},
    **{"tool": "observation", "observation": "observation", "function_call": "call"},
}
_KEYS = (("from", "value"), ("role", "content"))  # both are met under both names of the list
_WRITE = 'write it as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
_WRITE_CALL = 'write it as {"name": "get_weather", "arguments": {"city": "北京"}}'
_WRITE_TOOLS = 'write it as [{"name": "get_weather", "description": "…", "parameters": {…}}]'


@dataclass(frozen=True, slots=True)
class Said:
    """What one side says before the other does.

    Args:
        speaker: user, assistant or system.
        parts: its messages.
        number: of the first of them in the row's list, from 1.
    """

    speaker: str
    parts: tuple[Part, ...]
    number: int

    @property
    def text(self) -> str:
        return Turn.of(self.parts)

    @property
    def uses_tools(self) -> bool:
        return any(part.call or part.role == "observation" for part in self.parts)


def turns_of(value: object) -> list[Said] | Finding:
    """The turns of a list of messages; messages of one side are one turn where a tool is called or answers among them."""
    if not isinstance(value, list):
        return Finding(f"is {described(value)}, not a list of messages", _WRITE)
    if not value:
        return Finding("is an empty list", "write at least one question and its answer, or delete the row")
    turns: list[Said] = []
    for number, message in enumerate(value, start=1):
        found = _said(message, number)
        if isinstance(found, Finding):
            return found
        for said in found:
            last = turns[-1] if turns else None
            if said.parts[0].role == "observation" and (last is None or last.parts[-1].role == "user"):
                problem = f"message {number} is what a tool returned, and no call stands before it"
                return Finding(problem, "write the assistant's call before it, or delete the row")
            if last is not None and last.speaker == said.speaker and (last.uses_tools or said.uses_tools):
                turns[-1] = Said(last.speaker, last.parts + said.parts, last.number)
            else:
                turns.append(said)
    return turns


def order_finding(turns: list[Said], references: bool) -> Finding | None:
    """None where user and assistant take turns and, with references, the assistant has the last word.

    Args:
        turns: without a leading system message.
        references: whether the last answer is needed.
    """
    delete = "or delete the row"
    if not turns:
        return Finding("holds a system message only", f"add a question and its answer, {delete}")
    for index, said in enumerate(turns):
        number = said.number
        if said.speaker == "system":
            return Finding(f"message {number} is a system message", f"put it first, once, {delete}")
        if said.speaker != ("user", "assistant")[index % 2]:
            if index == 0:
                return Finding(f"message {number}, the first, is the assistant's", f"start with a question, {delete}")
            fix = f"join them into one message, {delete}"
            return Finding(f"messages {number - 1} and {number} are both the {said.speaker}'s", fix)
    if references and turns[-1].speaker == "user":
        return Finding(f"message {turns[-1].number}, the last, is the user's", "add the answer, or delete that message")
    return None


def tools_in(value: object) -> list[Mapping[str, Any]] | Finding:
    """Descriptions of functions, from a list or its JSON; none where the value stands for nothing."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            return Finding(f"is {described(value)}, not a list of tools", _WRITE_TOOLS)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return Finding(f"is {described(value)}, not a list of tools", _WRITE_TOOLS)
    return value


def _said(message: object, number: int) -> list[Said] | Finding:
    """What one message says: nearly always one thing."""
    keys = next((pair for pair in _KEYS if isinstance(message, dict) and pair[0] in message), None)
    if keys is None:
        return Finding(f"message {number} is {described(message)}, without from or role", _WRITE)
    message = cast("dict[str, Any]", message)
    role = message[keys[0]]
    speaker = _SPEAKERS.get(role) if isinstance(role, str) else None
    if speaker is None:
        problem = f"the {keys[0]} of message {number} is {described(role)}"
        return Finding(
            problem, f"use {'human, gpt' if keys[0] == 'from' else 'user, assistant'} or system, or delete the row"
        )
    if role == "tool" and "parameters" in message:
        return _official_tool(message, number)
    if speaker == "call":
        return _call_in(message.get(keys[1]), number)
    calls = _calls(message.get("tool_calls"), number) if speaker == "assistant" else []
    if isinstance(calls, Finding):
        return calls
    if keys[1] not in message and not calls:
        return Finding(f"message {number} has no {keys[1]}", "write its text or delete the row")
    text = message.get(keys[1])
    if speaker == "observation" and text is not None and not isinstance(text, str):
        text = arguments_text(text)
    optional = speaker == "system" or bool(calls)
    if found := (optional_text_finding(text) if optional else text_finding(text)):
        return Finding(f"the {keys[1]} of message {number} {found.problem}", found.fix)
    name = message.get("metadata")
    if speaker == "assistant" and isinstance(name, str) and name.strip():  # as ChatGLM3's own code keeps a call
        return [Said("assistant", (Part("assistant", text or "", name.strip()),), number)]
    if speaker == "assistant":
        words = () if calls and not (text or "").strip() else (Part("assistant", text or ""),)
        return [Said("assistant", (*words, *calls), number)]
    side = "system" if speaker == "system" else "user"
    return [Said(side, (Part("observation" if speaker == "observation" else "user", text or ""),), number)]


def _official_tool(message: dict[str, Any], number: int) -> list[Said] | Finding:
    """A call and what it returned."""
    name = message.get("name")
    if found := text_finding(name):
        return Finding(f"the name of message {number} {found.problem}", "write the name of the tool")
    call = Part("assistant", arguments_text(message["parameters"]), str(name))
    observation = Part("observation", arguments_text(message.get("observation")))
    return [Said("assistant", (call,), number), Said("user", (observation,), number)]


def _calls(value: object, number: int) -> list[Part] | Finding:
    """OpenAI's `tool_calls`."""
    if value is None or value == []:
        return []
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        call = _call(entry.get("function") if isinstance(entry, dict) else entry)
        if call is None:
            fix = _WRITE_CALL.replace("write it as ", 'write each as {"function": ') + "}"
            return Finding(f"the tool_calls of message {number} hold {described(entry)}", fix)
        calls.append(call)
    return calls


def _call_in(value: object, number: int) -> list[Said] | Finding:
    """ShareGPT's function_call, an object or its JSON."""
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value)
        except ValueError:
            given = None
    call = _call(given)
    if call is None:
        return Finding(f"the function_call of message {number} is {described(value)}", _WRITE_CALL)
    return [Said("assistant", (call,), number)]


def _call(value: object) -> Part | None:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str) or not name.strip():
        return None
    return Part("assistant", arguments_text(value.get("arguments")), name)
