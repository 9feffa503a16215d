"""ChatGLM2's prompt template: the one function that training, evaluation, serving and `apply_chat_template` share.

Source: THUDM/chatglm2-6b `tokenization_chatglm.py`, `build_prompt`.
"""

from collections.abc import Mapping, Sequence

from ptuning.errors import DataError

NAME = "chatglm2"  # written into every checkpoint, so that evaluation can refuse another template

History = Sequence[tuple[str, str]]


def build_prompt(query: str, history: History = (), system: str = "") -> str:
    """`[Round i]\\n\\n问：Q\\n\\n答：A\\n\\n` for each past turn, then the open round that the model answers.

    Args:
        query: the newest question.
        history: past (question, answer) turns, oldest first.
        system: text put in front of everything; ChatGLM2 has no role of its own for it.
    """
    rounds = [f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, start=1)]
    prompt = "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："
    return f"{system}\n\n{prompt}" if system else prompt


def split_messages(messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[str, str]], str, str | None]:
    """Turns OpenAI-style messages into (system, history, query, answer); answer is None where the last turn is open.

    Raises:
        DataError: roles that don't alternate, an unknown role, content that isn't text.
    """
    system, turns = "", []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        where = f"messages[{index}]"
        if not isinstance(content, str):
            raise DataError(f"{where}: content is {type(content).__name__}, expected text")
        if role == "system" and index == 0:
            system = content
        elif role == ("user" if len(turns) % 2 == 0 else "assistant"):
            turns.append(content)
        else:
            expected = "user" if len(turns) % 2 == 0 else "assistant"
            raise DataError(
                f"{where}: role is {role!r}, expected {expected!r} (one optional system message, then user and "
                "assistant in turn)"
            )
    if not turns:
        raise DataError("messages: no user message")
    answer = turns.pop() if len(turns) % 2 == 0 else None
    history = list(zip(turns[0:-1:2], turns[1:-1:2], strict=True))
    return system, history, turns[-1], answer
