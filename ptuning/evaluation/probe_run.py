"""The probe in two halves, before and after tuning, with the base's half kept in the run folder between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptuning.data.encode import EncodedRow, Encoder
from ptuning.data.formats import Record
from ptuning.data.problems import Problem
from ptuning.data.rows import iterate_rows
from ptuning.errors import DataError
from ptuning.evaluation.probe import (
    ProbeQuestion,
    mean_loss,
    probe_lines,
    probe_records,
    probe_rows,
    probe_summary,
)
from ptuning.runs.folder import PROBE_BASE
from ptuning.runs.lines import read_lines


@dataclass(frozen=True)
class Prober:
    """How the current model answers and computes losses. Under several processes both functions return the results of
    all questions on every process.

    Args:
        questions: of `read_probe`.
        encoder: with no source_prefix and loss on the last answer, so that the questions stand as they are.
        answer: rows → (text, whether the model ended by itself), greedy.
        losses: rows → (summed loss, tokens), as `answer_losses`.
    """

    questions: Sequence[ProbeQuestion]
    encoder: Encoder
    answer: Callable[[list[Record]], list[tuple[str, bool]]]
    losses: Callable[[list[EncodedRow]], list[tuple[float, int]]]


def probe_base(prober: Prober) -> list[dict[str, Any]]:
    """With the untuned base: its answers and their loss under itself.

    Returns:
        One {index, kind, prompt, base, finished, base_loss, base_tokens} a question, to be kept in probe_base.jsonl.
    """
    answers = prober.answer(probe_records(prober.questions))
    texts, finished = [text for text, _ in answers], [ended for _, ended in answers]
    losses = prober.losses(probe_rows(prober.encoder, prober.questions, texts, finished))
    return [
        {
            "index": index,
            "kind": question.kind,
            "prompt": question.prompt,
            "base": text,
            "finished": ended,
            "base_loss": mean_loss(loss, tokens),
            "base_tokens": tokens,
        }
        for index, (question, (text, ended), (loss, tokens)) in enumerate(
            zip(prober.questions, answers, losses, strict=True)
        )
    ]


def probe_tuned(prober: Prober, base: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """With the tuned model: its answers, and its loss on the base's.

    Args:
        base: what `probe_base` or `read_probe_base` returned.

    Returns:
        The lines of probe.jsonl and their summary.
    """
    texts, finished = [line["base"] for line in base], [line["finished"] for line in base]
    tuned = [text for text, _ in prober.answer(probe_records(prober.questions))]
    tuned_losses = prober.losses(probe_rows(prober.encoder, prober.questions, texts, finished))
    base_losses = [((line["base_loss"] or 0.0) * line["base_tokens"], line["base_tokens"]) for line in base]
    lines = probe_lines(prober.questions, texts, tuned, base_losses, tuned_losses)
    return lines, probe_summary(lines)


def read_probe_base(folder: Path, questions: Sequence[ProbeQuestion]) -> list[dict[str, Any]] | None:
    """The base's half of an earlier run, such as the one that is resumed; None where the folder has none.

    Raises:
        DataError: it can't be read, or answers other questions.
    """
    path = folder / PROBE_BASE
    if not path.is_file():
        return None
    lines, fix = [], "delete the file to answer them again with the base"
    for number, row in read_lines(path, fix):
        for field in ("prompt", "base", "finished", "base_loss", "base_tokens"):
            if field not in row:
                raise DataError(str(Problem(str(path), number, field, "is missing", fix)))
        lines.append((number, row))
    if len(lines) != len(questions):
        raise DataError(f"{path}: answers {len(lines)} questions, the probe has {len(questions)}: {fix}")
    for (number, row), question in zip(lines, questions, strict=True):
        if row["prompt"] != question.prompt:
            problem = f"{row['prompt']!r} is not the question in {question.source}, {question.prompt!r}"
            raise DataError(str(Problem(str(path), number, "prompt", problem, fix)))
    return [row for _, row in lines]
