"""Rows that can be trained on but look wrong: noted with their lines, never refused."""

from __future__ import annotations

import re

from ptuning.data.record import Record

TRAINED_LENGTH = 8192  # tokens of context that ChatGLM2-6B's dialogues were trained with

# Kind → what it means, for the report.
MEANING = {
    "echo": "the answer is the question again",
    "control_text": "control tokens or the template's own words stand in the text ([gMASK], </s>, [Round 1], …), and the "
    "model learns to write them",
    "damaged_text": "damaged characters (U+FFFD, 锟斤拷), left from a wrong conversion of the encoding",
    "html": "HTML tags or entities",
    "very_long": f"more than {TRAINED_LENGTH} tokens, which is longer than what ChatGLM2-6B was trained with",
}

_CONTROL = re.compile(r"\[(?:gMASK|sMASK|MASK)\]|</?s>|<\|\w+\|>|\[Round \d+\]")
_DAMAGED = re.compile("\ufffd|锟斤拷|烫烫烫")
_HTML = re.compile(
    r"</?(?:p|br|hr|div|span|a|b|i|em|strong|font|img|ul|ol|li|table|t[rdh]|h[1-6])(?:\s[^<>]*)?/?>"
    r"|&(?:nbsp|lt|gt|amp|quot|#\d+);",
    re.IGNORECASE,
)


def oddities(record: Record) -> list[str]:
    """The kinds that the record's texts show; very_long needs a tokenizer and is not among them."""
    answer = record.response or ""
    found = ["echo"] if answer.strip() == record.prompt.strip() else []
    turns = [text for turn in record.history for text in turn]
    text = "\n".join([record.system or "", *turns, record.prompt, answer])
    if _CONTROL.search(text):
        found.append("control_text")
    if _DAMAGED.search(text):
        found.append("damaged_text")
    if _HTML.search(text):
        found.append("html")
    return found
