"""The rules for the values of a row: text that can be tokenized, and a history of question-answer pairs."""

from __future__ import annotations

from typing import NamedTuple

from ptuning.data.problems import described, quoted

_PAIRS = 'write the history as [["question", "answer"], …], oldest first'


class Fault(NamedTuple):
    """What is wrong with a value and how to correct it; the caller knows the file, the line and the column."""

    problem: str
    fix: str


def text_fault(value: object) -> Fault | None:
    """None for text with at least one visible character and no lone surrogate, which UTF-8 can't encode."""
    if value is None:
        return Fault("is null", "write a text or delete the row")
    if not isinstance(value, str):
        fix = f'put it in double quotes: "{value}"' if _is_number(value) else "write one text"
        return Fault(f"is {described(value)}, not text", fix)
    if not value:
        return Fault("is empty", "write a text or delete the row")
    if not value.strip():
        return Fault(f"is only white space ({quoted(value)})", "write a text or delete the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(value[error.start]):04x}"
        problem = f"has half a character ({escape}, a lone surrogate) as character {error.start + 1}"
        return Fault(problem, "delete the escape, or write both halves of the pair")
    return None


def optional_text_fault(value: object) -> Fault | None:
    """None for text, and for what stands for no text: null and white space."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_fault(value)


def history_fault(value: object) -> Fault | None:
    """None for a list of [question, answer] pairs of text, and for what stands for no history: null and blank text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list):
        return Fault(f"is {described(value)}, not a list of [question, answer] pairs", _PAIRS)
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            return Fault(f"turn {number} is {described(turn)}, not a pair [question, answer]", _PAIRS)
        for name, text in zip(("question", "answer"), turn, strict=True):
            if fault := text_fault(text):
                return Fault(f"the {name} of turn {number} {fault.problem}", fault.fix.replace("the row", "the turn"))
    return None


def history_pairs(value: object) -> tuple[tuple[str, str], ...]:
    """The (question, answer) turns of a value without a history_fault, oldest first."""
    return tuple((question, answer) for question, answer in value) if isinstance(value, list) else ()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and len(str(value)) <= 40
