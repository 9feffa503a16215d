"""What a split looks like in tokens, for the run's record and its report."""

from collections.abc import Sequence

import numpy as np

from ptuning.data.encode import IGNORE, EncodedRow, EncodingReport
from ptuning.data.load import Split

_BINS = 30


def split_summary(split: Split, rows: Sequence[EncodedRow], report: EncodingReport) -> dict:
    """Counts, and lengths after cutting.

    Args:
        split: of these rows.
        rows: encoded for training.
        report: of their encoding.
    """
    answers = [sum(label != IGNORE for label in row.labels) for row in rows]
    prompts = [len(row.input_ids) - answer for row, answer in zip(rows, answers, strict=True)]
    return {
        "file": split.file,
        "sha256": split.sha256,
        "rows": len(split.records),
        "skipped": split.skipped,
        "format": split.guessed,
        "mixed_in": [text for _, text in split.mixed_in],
        "turns": sum(len(record.history) + 1 for record in split.records),
        "prompt_tokens": _lengths(prompts),
        "answer_tokens": _lengths(answers),
        "cut_prompts": report.dropped_systems + report.dropped_turns + report.cut_questions,
        "cut_answers": report.cut_answers,
    }


def _lengths(values: Sequence[int]) -> dict:
    array = np.array(values)
    top = int(array.max())
    width = max(-(-(top + 1) // _BINS), 1)
    counts = np.bincount(array // width)
    return {
        "mean": round(float(array.mean()), 1),
        **{f"p{q}": int(np.percentile(array, q, method="higher")) for q in (50, 90, 99)},
        "max": top,
        "histogram": [[i * width, (i + 1) * width, int(count)] for i, count in enumerate(counts)],
    }
