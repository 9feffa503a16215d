"""The figures of a file of predictions, each with its 95 % interval.

Shapes: N rows, K statistics a row, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptuning.evaluation.bootstrap import Figure, percentile_interval, ratio, resampled_sums
from ptuning.evaluation.corpus import bleu, bleu_statistics, chrf, chrf_statistics
from ptuning.evaluation.scores import METRICS, mean_scores

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Metric:
    """One figure of a whole file.

    Args:
        name: key in metrics.json.
        label: column or row head in a table.
        statistics: lines → (N, K).
        figure: (R, K) sums → (R,) values.
        better: "higher", "lower", or "" where neither is.
    """

    name: str
    label: str
    statistics: Callable[[Lines], np.ndarray]
    figure: Figure
    better: str


@dataclass(frozen=True)
class Measurement:
    """A metric's value on all rows, and on each of the (R,) resamples."""

    value: float
    samples: np.ndarray


def summarise(lines: Lines) -> dict[str, Any]:
    """Means, corpus figures, shares in percent and losses of predictions, and how sure they are.

    Args:
        lines: of predictions.jsonl, all of them: {"labels", "predict", "scores" (of `row_scores`), "tokens",
            "finished"}, and where known "loss" (summed over the reference's tokens) and "loss_tokens".

    Returns:
        The names of FIGURES, then rows, tokens (mean length of an answer) and intervals {name: [low, high]}. bleu-4 and
        rouge-1/2/l are exactly the official script's means, the rest is rounded to 4 places. answer_loss and
        answer_perplexity are absent where no line has a loss.

    Raises:
        DataError: there are no lines.
    """
    measured = measure(lines)
    values = {name: one.value if name in METRICS else round(one.value, 4) for name, one in measured.items()}
    return values | {
        "rows": len(lines),
        "tokens": round(sum(line["tokens"] for line in lines) / len(lines), 4),
        "intervals": {name: percentile_interval(one.samples) for name, one in measured.items()},
    }


def measure(lines: Lines) -> dict[str, Measurement]:
    """Every metric that the lines have, on all rows and on each resample. Two files of equally many lines are resampled
    alike.

    Raises:
        DataError: there are no lines.
    """
    official = mean_scores([line["scores"] for line in lines])
    has_loss = any(line.get("loss_tokens") for line in lines)
    metrics = [metric for metric in FIGURES.values() if has_loss or metric.statistics is not _losses]
    tables = [metric.statistics(lines) for metric in metrics]
    samples = resampled_sums(np.concatenate(tables, axis=1))
    measured, start = {}, 0
    for metric, table in zip(metrics, tables, strict=True):
        value = official.get(metric.name)
        if value is None:
            value = float(metric.figure(table.sum(0, keepdims=True))[0])
        columns = slice(start, start + table.shape[1])
        measured[metric.name] = Measurement(value, metric.figure(samples[:, columns]))
        start = columns.stop
    return measured


def _column(values: Sequence[float]) -> np.ndarray:
    """Values and ones, of which `ratio` makes a mean: (N,) → (N, 2)."""
    return np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _score(name: str, label: str, better: str) -> Metric:
    return Metric(name, label, lambda lines: _column([line["scores"][name] for line in lines]), ratio, better)


def _share(name: str, label: str, is_so: Callable[[Mapping[str, Any]], bool]) -> Metric:
    return Metric(name, label, lambda lines: _column([100.0 * is_so(line) for line in lines]), ratio, "lower")


def _pairs(lines: Lines) -> list[tuple[str, str]]:
    return [(line["predict"], line["labels"]) for line in lines]


def _losses(lines: Lines) -> np.ndarray:
    """Summed loss and tokens, both 0 for a row without: (N, 2)."""
    known = [(line["loss"], line["loss_tokens"]) if line.get("loss_tokens") else (0.0, 0) for line in lines]
    return np.array(known, dtype=np.float64)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(ratio(sums), 700))  # e^710 is more than a float holds


FIGURES = {
    metric.name: metric
    for metric in (
        _score("bleu-4", "BLEU-4", "higher"),
        _score("rouge-1", "ROUGE-1", "higher"),
        _score("rouge-2", "ROUGE-2", "higher"),
        _score("rouge-l", "ROUGE-L", "higher"),
        Metric("corpus_bleu", "corpus BLEU", lambda lines: bleu_statistics(_pairs(lines)), bleu, "higher"),
        Metric("chrf", "chrF", lambda lines: chrf_statistics(_pairs(lines)), chrf, "higher"),
        _score("exact_match", "exact match %", "higher"),
        _score("token_f1", "token F1", "higher"),
        _score("length_ratio", "length ratio", ""),
        _share("empty", "empty %", lambda line: not line["predict"].strip()),
        _share("cut", "cut %", lambda line: not line["finished"]),
        _score("repeating", "repeating %", "lower"),
        Metric("answer_loss", "answer loss", _losses, ratio, "lower"),
        Metric("answer_perplexity", "perplexity", _losses, _perplexity, "lower"),
    )
}
"""Every figure by its name, in the order of tables."""
