"""Rows that can be trained on but look wrong, and rows that repeat others: noted with their lines, never refused.

Rows are known by 8-byte hashes, without keeping their texts. Two different rows out of a million share a hash with a
probability of about 3 in 100 million.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from dataclasses import dataclass, field

import numpy as np

from ptuning.data.formats import Record

_CONTROL = re.compile(r"\[(?:gMASK|sMASK|MASK)\]|</?s>|<\|\w+\|>|\[Round \d+\]")
_DAMAGED = re.compile("\ufffd|锟斤拷|烫烫烫")
_HTML = re.compile(
    r"</?(?:p|br|hr|div|span|a|b|i|em|strong|font|img|ul|ol|li|table|t[rdh]|h[1-6])(?:\s[^<>]*)?/?>"
    r"|&(?:nbsp|lt|gt|amp|quot|#\d+);",
    re.IGNORECASE,
)


def lint(record: Record) -> list[str]:
    """The kinds that the record's texts show, as words.py names them; very_long needs a tokenizer and is not among them."""
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


def _hashes() -> array:
    return array("Q")


@dataclass
class RowKeys:
    """Hashes of each clean row of a file, in its order, with the line it starts on."""

    rows: array = field(default_factory=_hashes)
    questions: array = field(default_factory=_hashes)  # with history and system text
    answers: array = field(default_factory=_hashes)
    lines: array = field(default_factory=_hashes)

    def add(self, record: Record, line: int) -> None:
        question = repr((record.system, record.history, record.prompt))
        self.questions.append(_hash(question))
        self.answers.append(_hash(record.response or ""))
        self.rows.append(_hash(repr((question, record.response))))
        self.lines.append(line)

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows equal to an earlier one: (their numbers from 0 in order, the numbers of their first occurrences)."""
        _, first, inverse = np.unique(_array(self.rows), return_index=True, return_inverse=True)
        first = first[inverse]
        numbers = np.flatnonzero(first != np.arange(len(first)))
        return numbers, first[numbers]

    def frequent_answers(self, least: int) -> list[tuple[int, int]]:
        """(rows, first line) of the answers that occur at least so often, most frequent first."""
        _, first, counts = np.unique(_array(self.answers), return_index=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(int(counts[i]), int(self.lines[first[i]])) for i in order[: np.count_nonzero(counts >= least)]]


@dataclass(frozen=True)
class Overlap:
    """What two files share.

    Args:
        rows: of the second file that stand in the first, question and answer.
        questions: of the second file that stand in the first, whatever the answer.
        examples: (line in the first, line in the second) of some of those questions.
    """

    rows: int
    questions: int
    examples: list[tuple[int, int]]


def overlap(first: RowKeys, second: RowKeys, shown: int = 5) -> Overlap:
    """Compares two files."""
    known, where = np.unique(_array(first.questions), return_index=True)
    shared = np.flatnonzero(np.isin(_array(second.questions), known))
    examples = []
    for number in shared[:shown]:
        match = where[np.searchsorted(known, np.uint64(second.questions[number]))]
        examples.append((int(first.lines[match]), int(second.lines[number])))
    rows = int(np.isin(_array(second.rows), _array(first.rows)).sum())
    return Overlap(rows, len(shared), examples)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _array(values: array) -> np.ndarray:
    return np.frombuffer(values, dtype=np.uint64) if values else np.empty(0, dtype=np.uint64)
