"""The forgetting probe: fixed general questions, answered before and after tuning.

The base's own answers are the yardstick: how likely are they still under the tuned model? Its loss on them is compared
with the base's, which is low because the base wrote them itself. The base's half is kept in the run folder in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ptuning.data.encode import EncodedRow, Encoder
from ptuning.data.formats import Record
from ptuning.data.problems import Problem, described, listed
from ptuning.data.rows import iterate_rows
from ptuning.errors import DataError
from ptuning.evaluation.corpus import percentile_interval, ratio, resampled_sums
from ptuning.runs.folder import PROBE_BASE
from ptuning.runs.lines import read_lines

QUESTIONS = Path(str(resources.files("ptuning.evaluation"))) / "questions" / "probe.jsonl"
KINDS = ("knowledge", "arithmetic", "rewriting", "chat")


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """One question; `source` is its file and line."""

    kind: str
    prompt: str
    source: str


def read_probe(path: str | Path = QUESTIONS) -> list[ProbeQuestion]:
    """The fixed questions, in the file's order.

    Raises:
        DataError: the file isn't there, can't be read, or a row is no question.
    """
    questions = []
    for line, row in iterate_rows(path):
        if isinstance(row, Problem):
            raise DataError(str(row))
        kind, prompt = row.get("kind"), row.get("prompt")
        if not isinstance(kind, str) or kind not in KINDS:
            problem = f"is {described(kind)}"
            raise DataError(str(Problem(str(path), line, "kind", problem, f"use one of {listed(list(KINDS))}")))
        if not isinstance(prompt, str) or not prompt.strip():
            problem = f"is {described(prompt)}"
            raise DataError(str(Problem(str(path), line, "prompt", problem, "write a question")))
        questions.append(ProbeQuestion(kind, prompt, f"{path}:{line}"))
    return questions


@dataclass(frozen=True)
class Prober:
    """How the current model answers and computes losses. Under several processes both functions return the results of
    all questions on every process.

    Args:
        questions: of `read_probe`.
        encoder: with no source_prefix and loss on the last answer, so that the questions stand as they are.
        end_id: the token that follows a complete answer.
        answer: rows → (text, whether the model ended by itself), greedy.
        losses: rows → (summed loss, tokens), as `answer_losses`.
    """

    questions: Sequence[ProbeQuestion]
    encoder: Encoder
    end_id: int
    answer: Callable[[list[Record]], list[tuple[str, bool]]]
    losses: Callable[[list[EncodedRow]], list[tuple[float, int]]]


def probe_records(questions: Sequence[ProbeQuestion], answers: Sequence[str] | None = None) -> list[Record]:
    """The questions as rows to answer, or with the base's answers as rows to compute a loss of."""
    responses = [None] * len(questions) if answers is None else answers
    return [
        Record(prompt=question.prompt, response=response, history=(), source=question.source)
        for question, response in zip(questions, responses, strict=True)
    ]


def probe_rows(prober: Prober, answers: Sequence[str], finished: Sequence[bool]) -> list[EncodedRow]:
    """The base's answers as rows for `answer_losses`. A cut answer gets no end token: the base didn't end there.

    Args:
        answers: one a question.
        finished: whether the base ended the answer by itself.
    """
    rows, _ = prober.encoder.training_rows(probe_records(prober.questions, answers))
    return [
        replace(row, input_ids=row.input_ids[:-1], labels=row.labels[:-1])
        if not ended and row.labels[-1] == prober.end_id
        else row
        for row, ended in zip(rows, finished, strict=True)
    ]


def probe_base(prober: Prober) -> list[dict[str, Any]]:
    """With the untuned base: its answers and their loss under itself.

    Returns:
        One {index, kind, prompt, base, finished, base_loss, base_tokens} a question, to be kept in probe_base.jsonl.
    """
    answers = prober.answer(probe_records(prober.questions))
    texts, finished = [text for text, _ in answers], [ended for _, ended in answers]
    losses = prober.losses(probe_rows(prober, texts, finished))
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
    lines = side_by_side(base, tuned, prober.losses(probe_rows(prober, texts, finished)))
    return lines, probe_summary(lines)


def side_by_side(
    base: Sequence[Mapping[str, Any]], answers: Sequence[str], losses: Sequence[tuple[float, int]]
) -> list[dict[str, Any]]:
    """Both answers to each question.

    Args:
        base: of `probe_base`.
        answers: the tuned model's.
        losses: (sum, tokens) of each of the base's answers under the tuned model.

    Returns:
        One {index, kind, prompt, base, tuned, base_loss, tuned_loss, tokens} a question; the losses are means over the
        tokens of the base's answer, None where it has none.
    """
    return [
        {key: line[key] for key in ("index", "kind", "prompt", "base")}
        | {"tuned": text, "base_loss": line["base_loss"], "tuned_loss": mean_loss(*loss), "tokens": loss[1]}
        for line, text, loss in zip(base, answers, losses, strict=True)
    ]


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


def mean_loss(loss: float, tokens: int) -> float | None:
    """Loss a token, in 4 places: batches of other processes differ in the seventh digit. None without tokens."""
    return round(loss / tokens, 4) if tokens else None


def probe_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tuning did to the general answers.

    Args:
        lines: of `side_by_side`.

    Returns:
        rows; same: percent of answers left exactly as they were; base_loss and tuned_loss: the means over questions of
        the loss a token, so that a long answer counts no more than a short one; change: tuned_loss - base_loss;
        interval: of the change, 95 % by resampling questions. The losses, change and interval are None where no answer
        has tokens. kinds: the same for each kind of question.

    Raises:
        DataError: there are no lines.
    """
    if not lines:
        raise DataError(
            "0 probe questions were answered, and a summary needs at least 1: check ptuning/evaluation/questions/probe.jsonl"
        )
    kinds = Counter(line["kind"] for line in lines)
    by_kind = {kind: _summary([line for line in lines if line["kind"] == kind]) for kind in kinds}
    return _summary(lines) | {"kinds": by_kind}


def _summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    same = sum(line["base"] == line["tuned"] for line in lines)
    result = {"rows": len(lines), "same": round(100 * same / len(lines), 4)}
    losses = [(line["base_loss"], line["tuned_loss"]) for line in lines if line["base_loss"] is not None]
    if not losses:
        return result | dict.fromkeys(("base_loss", "tuned_loss", "change", "interval"))
    table = np.array(losses)
    base, tuned = table.mean(0)
    changes = np.stack([table[:, 1] - table[:, 0], np.ones(len(table))], axis=1)
    return result | {
        "base_loss": round(float(base), 4),
        "tuned_loss": round(float(tuned), 4),
        "change": round(float(tuned - base), 4),
        "interval": percentile_interval(ratio(resampled_sums(changes))),
    }
