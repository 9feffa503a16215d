"""OpenAI's messages, in whatever order clients send them, as the dialogue that the model was trained on: questions and answers
in turn, and a system text.

What the template has no place for becomes text: a later system message part of the next question, and where it has no roles for
tools, a call and what it returned too.
"""

import json
from collections.abc import Sequence

from ptuning.families import Dialogue, Part, Turn, arguments_text
from ptuning.serving.errors import ApiError
from ptuning.serving.openai_schema import Message

_SYSTEM = ("system", "developer")


def dialogue_from(messages: Sequence[Message]) -> Dialogue:
    """The dialogue that ends with an open question.

    System messages before all others are the system text; messages of one side in a row are joined by a line break; an answer
    that comes first answers an empty question.

    Raises:
        ApiError: nothing is asked at the end.
    """
    if messages[-1].role == "assistant":
        place = f"messages[{len(messages) - 1}]"
        raise ApiError(400, f"{place}: role is 'assistant'; the last message must be the user's", param="messages")
    system: list[str] = []
    sides: list[tuple[bool, list[Part]]] = []  # (is it the model's, its parts), the two in turn
    for message in messages:
        if not sides and message.role in _SYSTEM:
            system.append(message.text)
            continue
        is_answer = message.role == "assistant"
        if not sides and is_answer:
            sides.append((False, []))
        if sides and sides[-1][0] is is_answer:
            sides[-1][1].extend(_parts(message))
        else:
            sides.append((is_answer, _parts(message)))
    if not sides:  # system messages alone are the question
        sides, system = [(False, [Part("user", text) for text in system])], []
    turns = [Turn.of(parts) for _, parts in sides]
    history = tuple(zip(turns[0:-1:2], turns[1::2], strict=True))
    return Dialogue(turns[-1], history, "\n".join(text for text in system if text) or None)


def _parts(message: Message) -> list[Part]:
    if message.role == "tool":
        return [Part("observation", message.text)]
    if message.role != "assistant":
        return [Part("user", message.text)]
    said = [Part("assistant", message.text)] if message.text or not message.tool_calls else []
    return said + [_call(call) for call in message.tool_calls or ()]


def _call(call: dict) -> Part:
    function = call.get("function") or {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:  # as text, whatever it is
        return Part("assistant", f"调用工具：{json.dumps(call, ensure_ascii=False)}")
    return Part("assistant", arguments_text(function.get("arguments", "")), name)
