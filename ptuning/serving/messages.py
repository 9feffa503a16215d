"""OpenAI's messages, in whatever order clients send them, as the dialogue that the model was trained on: questions and answers
in turn, and a system text.

What the template has no place for becomes text: a later system message part of the next question, what a tool returned too.
"""

import json
from collections.abc import Sequence

from ptuning.families import Dialogue
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
    sides: list[tuple[bool, list[str]]] = []  # (is it the model's, its texts), the two in turn
    for message in messages:
        text = _text(message)
        if not sides and message.role in _SYSTEM:
            system.append(text)
            continue
        is_answer = message.role == "assistant"
        if not sides and is_answer:
            sides.append((False, []))
        if sides and sides[-1][0] is is_answer:
            sides[-1][1].append(text)
        else:
            sides.append((is_answer, [text]))
    if not sides:  # system messages alone are the question
        sides, system = [(False, system)], []
    turns = ["\n".join(text for text in texts if text) for _, texts in sides]
    history = tuple(zip(turns[0:-1:2], turns[1::2], strict=True))
    return Dialogue(turns[-1], history, "\n".join(text for text in system if text) or None)


def _text(message: Message) -> str:
    if message.role == "tool":
        return f"工具返回：{message.text}"
    calls = [f"调用工具：{_call(call)}" for call in message.tool_calls or ()]
    return "\n".join(part for part in (message.text, *calls) if part) if calls else message.text


def _call(call: dict) -> str:
    function = call.get("function") or {}
    if not isinstance(function, dict):
        return json.dumps(call, ensure_ascii=False)
    return f"{function.get('name', '')}({function.get('arguments', '')})"
