"""The forgetting probe: fixed general questions, answered before and after tuning.

The base's own answers are the yardstick: how likely are they still under the tuned model? Its loss on them is compared
with the base's, which is low because the base wrote them itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ptuning
from ptuning.data.encode import EncodedRow, Encoder
from ptuning.data.formats import Record
from ptuning.data.problems import Problem, described, listed
from ptuning.data.rows import iterate_rows
from ptuning.errors import DataError
from ptuning.evaluation.bootstrap import percentile_interval, ratio, resampled_sums

KINDS = ("knowledge", "arithmetic", "rewriting", "chat")
PROBE_FILE = Path(ptuning.__file__).resolve().parent.parent / "data" / "probe" / "probe.jsonl"


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """One question; `source` is its file and line."""

    kind: str
    prompt: str
    source: str


def read_probe(path: str | Path = PROBE_FILE) -> list[ProbeQuestion]:
    """The fixed questions, in the file's order.

    Raises:
        DataError: the file isn't there, can't be read, or a row is no question.
    """
    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such file: the probe's questions come with the repository and not with the installed package; "
            "run from a checkout (pip install -e .), or leave --probe out"
        )
    questions = []
    for line, row in iterate_rows(path):
        if isinstance(row, Problem):
            raise DataError(str(row))
        if row.get("kind") not in KINDS:
            problem = f"is {described(row.get('kind'))}"
            raise DataError(str(Problem(str(path), line, "kind", problem, f"use one of {listed(list(KINDS))}")))
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            problem = f"is {described(row.get('prompt'))}"
            raise DataError(str(Problem(str(path), line, "prompt", problem, "write a question")))
        questions.append(ProbeQuestion(row["kind"], row["prompt"], f"{path}:{line}"))
    return questions


def probe_records(questions: Sequence[ProbeQuestion], answers: Sequence[str] | None = None) -> list[Record]:
    """The questions as rows to answer, or with the base's answers as rows to compute a loss of."""
    responses = [None] * len(questions) if answers is None else answers
    return [
        Record(prompt=question.prompt, response=response, history=(), source=question.source)
        for question, response in zip(questions, responses, strict=True)
    ]


def probe_rows(
    encoder: Encoder, questions: Sequence[ProbeQuestion], answers: Sequence[str], finished: Sequence[bool]
) -> list[EncodedRow]:
    """The base's answers as rows for `answer_losses`. A cut answer gets no end token: the base didn't end there.

    Args:
        encoder: with no source_prefix and loss on the last answer.
        finished: whether the base ended the answer by itself.
    """
    rows, _ = encoder.training_rows(probe_records(questions, answers))
    eos = encoder.template.end_id
    return [
        replace(row, input_ids=row.input_ids[:-1], labels=row.labels[:-1])
        if not ended and row.labels[-1] == eos
        else row
        for row, ended in zip(rows, finished, strict=True)
    ]


def probe_lines(
    questions: Sequence[ProbeQuestion],
    base_answers: Sequence[str],
    tuned_answers: Sequence[str],
    base_losses: Sequence[tuple[float, int]],
    tuned_losses: Sequence[tuple[float, int]],
) -> list[dict[str, Any]]:
    """Both answers side by side.

    Args:
        base_losses: (sum, tokens) of each of the base's answers under the base.
        tuned_losses: the same answers under the tuned model.

    Returns:
        One {index, kind, prompt, base, tuned, base_loss, tuned_loss, tokens} a question; the losses are means over the
        answer's tokens, None where it has none.
    """
    columns = zip(questions, base_answers, tuned_answers, base_losses, tuned_losses, strict=True)
    return [
        {
            "index": index,
            "kind": question.kind,
            "prompt": question.prompt,
            "base": base,
            "tuned": tuned,
            "base_loss": mean_loss(*base_loss),
            "tuned_loss": mean_loss(*tuned_loss),
            "tokens": base_loss[1],
        }
        for index, (question, base, tuned, base_loss, tuned_loss) in enumerate(columns)
    ]


def mean_loss(loss: float, tokens: int) -> float | None:
    """Loss a token, in 6 places; None without tokens."""
    return round(loss / tokens, 6) if tokens else None


def probe_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tuning did to the general answers.

    Args:
        lines: of `probe_lines`.

    Returns:
        rows; same: percent of answers left exactly as they were; base_loss and tuned_loss: the means over questions of
        the loss a token, so that a long answer counts no more than a short one; change: tuned_loss - base_loss;
        interval: of the change, 95 % by resampling questions. The losses, change and interval are None where no answer
        has tokens. kinds: the same for each kind of question.

    Raises:
        DataError: there are no lines.
    """
    if not lines:
        raise DataError("0 probe questions were answered, and a summary needs at least 1: check data/probe/probe.jsonl")
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
