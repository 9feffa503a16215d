"""The list of metrics, and what is made of it: the scores of a row, the figures of a whole file with their 95 % intervals.

A metric is entered once, in METRICS. Everything that shows metrics (the console, `ptuning compare`, the report) asks the list.

Shapes: N rows, K statistics a row, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from ptuning.evaluation.corpus import (
    Figure,
    bleu,
    bleu_statistics,
    chrf,
    chrf_statistics,
    percentile_interval,
    ratio,
    resampled_sums,
)
from ptuning.evaluation.scores import OFFICIAL, is_repeating, mean_scores, official_scores, token_f1
from ptuning.language import columns, language, padded
from ptuning.messages import message

Lines = Sequence[Mapping[str, Any]]
Place = Literal["console", "quality", "headline", "answer"]
"""The console's table; the report's figures of scores; its headlines; its tables of single answers."""


@dataclass(frozen=True)
class Metric:
    """One figure of a file of predictions.

    Args:
        name: key in metrics.json.
        label: column or row head in a table; `chinese` where it has another one there.
        better: "higher", "lower", or "" where neither is.
        row: (prediction, reference) → score of one answer, kept in its line; the figure is then the mean over rows.
        statistics: lines → (N, K), where the figure is no mean of such scores.
        figure: (R, K) sums → (R,) values.
        from_losses: of the references' losses and not of the answers: absent where the lines have none, and not scored while
            training, where the trainer has them.
        decimals: in a table; None: as many as the figure needs.
        shown: where besides metrics.json, `ptuning compare` and the report's table of all scores.
        rank: the report's best and worst answers go by the score of a row with the highest; 0: never.
    """

    name: str
    label: str
    better: str = ""
    row: Callable[[str, str], float] | None = None
    statistics: Callable[[Lines], np.ndarray] | None = None
    figure: Figure = ratio
    from_losses: bool = False
    decimals: int | None = 2
    shown: tuple[Place, ...] = ()
    rank: int = 0
    chinese: str = ""

    @property
    def title(self) -> str:
        """The label in the language of now."""
        return self.chinese if self.chinese and language() == "zh" else self.label

    def counted(self, lines: Lines) -> np.ndarray:
        """The statistics of each row, (N, K)."""
        if self.statistics is not None:
            return self.statistics(lines)
        return _column([line["scores"][self.name] for line in lines])

    def text(self, value: float, sign: str = "") -> str:
        """A value for people."""
        return f"{value:{sign}.{2 if self.decimals is None else self.decimals}f}"


def add_metric(metric: Metric) -> None:
    """Enters a metric at the end of the list."""
    METRICS[metric.name] = metric


def shown_in(place: Place) -> list[Metric]:
    """The metrics of a place, in the order of tables."""
    return [metric for metric in METRICS.values() if place in metric.shown]


def ranking() -> list[Metric]:
    """The metrics that tell good rows from bad ones, best suited first."""
    return sorted((metric for metric in METRICS.values() if metric.rank), key=lambda metric: -metric.rank)


def row_metrics() -> list[Metric]:
    """The metrics that score single rows."""
    return [metric for metric in METRICS.values() if metric.row is not None]


def row_scores(prediction: str, reference: str) -> dict[str, float]:
    """All scores of one answer, by the names of `row_metrics`."""
    return {metric.name: metric.row(prediction, reference) for metric in METRICS.values() if metric.row is not None}


@dataclass(frozen=True)
class Measurement:
    """A metric's value on all rows, and on each of the (R,) resamples."""

    value: float
    samples: np.ndarray


def measure(lines: Lines) -> dict[str, Measurement]:
    """Every metric that the lines have, on all rows and on each resample. Two files of equally many lines are resampled
    alike.

    Raises:
        DataError: there are no lines.
    """
    official = mean_scores([line["scores"] for line in lines])
    has_loss = any(line.get("loss_tokens") for line in lines)
    metrics = [metric for metric in METRICS.values() if has_loss or not metric.from_losses]
    tables = [metric.counted(lines) for metric in metrics]
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


def summarise(lines: Lines) -> dict[str, Any]:
    """Means, corpus figures, percentages and losses of predictions, and how sure they are.

    Args:
        lines: of predictions.jsonl, all of them: {"labels", "predict", "scores" (of `row_scores`), "tokens",
            "finished"}, and where known "loss" (summed over the reference's tokens) and "loss_tokens".

    Returns:
        The names of METRICS, then rows, tokens (mean length of an answer) and intervals {name: [low, high]}. bleu-4 and
        rouge-1/2/l are exactly the official script's means, the rest is rounded to 4 places. answer_loss and
        answer_perplexity are absent where no line has a loss.

    Raises:
        DataError: there are no lines.
    """
    measured = measure(lines)
    values = {name: one.value if name in OFFICIAL else round(one.value, 4) for name, one in measured.items()}
    return values | {
        "rows": len(lines),
        "tokens": round(sum(line["tokens"] for line in lines) / len(lines), 4),
        "intervals": {name: percentile_interval(one.samples) for name, one in measured.items()},
    }


def scores_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The main scores as a text table, one row a model."""
    metrics = shown_in("console")
    head = [*(metric.title for metric in metrics), message("rows")]
    rows = {"": head}
    for name, values in results.items():
        cells = [metric.text(values[metric.name]) if metric.name in values else "" for metric in metrics]
        rows[message(name)] = [*cells, str(values["rows"])]
    width, widths = max(map(columns, rows)), [max(columns(title), 8) for title in head]
    return "\n".join(
        f"{padded(name, width)}  " + "".join(f"  {padded(cell, w, '>')}" for cell, w in zip(cells, widths, strict=True))
        for name, cells in rows.items()
    )


# --- the list -------------------------------------------------------------------------------------------------------------


def _column(values: Sequence[float]) -> np.ndarray:
    """Values and ones, of which `ratio` makes a mean: (N,) → (N, 2)."""
    return np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _official(name: str) -> Callable[[str, str], float]:
    return lambda prediction, reference: official_scores(prediction, reference)[name]


def _percent(is_so: Callable[[Mapping[str, Any]], bool]) -> Callable[[Lines], np.ndarray]:
    return lambda lines: _column([100.0 * is_so(line) for line in lines])


def _of_pairs(count: Callable[[list[tuple[str, str]]], np.ndarray]) -> Callable[[Lines], np.ndarray]:
    return lambda lines: count([(line["predict"], line["labels"]) for line in lines])


def _losses(lines: Lines) -> np.ndarray:
    """Summed loss and tokens, both 0 for a row without: (N, 2)."""
    known = [(line["loss"], line["loss_tokens"]) if line.get("loss_tokens") else (0.0, 0) for line in lines]
    return np.array(known, dtype=np.float64)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(ratio(sums), 700))  # e^710 is more than a float holds


def _exact_match(prediction: str, reference: str) -> float:
    return 100.0 if prediction.strip() == reference.strip() else 0.0


def _token_f1(prediction: str, reference: str) -> float:
    return round(100 * token_f1(prediction, reference), 4)


def _length_ratio(prediction: str, reference: str) -> float:
    return round(len(prediction.strip()) / max(len(reference.strip()), 1), 4)


def _repeating(prediction: str, reference: str) -> float:
    return 100.0 if is_repeating(prediction) else 0.0


_FOUR: tuple[Place, ...] = ("console", "quality", "answer")
_higher, _lower = partial(Metric, better="higher"), partial(Metric, better="lower")

METRICS = {
    metric.name: metric
    for metric in (
        _higher("bleu-4", "BLEU-4", row=_official("bleu-4"), shown=(*_FOUR, "headline"), rank=3),
        _higher("rouge-1", "ROUGE-1", row=_official("rouge-1"), shown=_FOUR, rank=2),
        _higher("rouge-2", "ROUGE-2", row=_official("rouge-2"), shown=_FOUR),
        _higher("rouge-l", "ROUGE-L", row=_official("rouge-l"), shown=(*_FOUR, "headline"), rank=4),
        _higher(
            "corpus_bleu",
            "corpus BLEU",
            statistics=_of_pairs(bleu_statistics),
            figure=bleu,
            shown=("quality",),
            chinese="语料 BLEU",
        ),
        _higher("chrf", "chrF", statistics=_of_pairs(chrf_statistics), figure=chrf, shown=("console", "quality")),
        _higher("exact_match", "exact match %", row=_exact_match, shown=("console", "quality"), chinese="完全相同 %"),
        _higher("token_f1", "token F1", row=_token_f1, shown=("quality",), rank=1),
        Metric("length_ratio", "length ratio", row=_length_ratio, chinese="长度比"),
        _lower(
            "empty",
            "empty %",
            statistics=_percent(lambda line: not line["predict"].strip()),
            shown=("console",),
            chinese="空 %",
        ),
        _lower(
            "cut",
            "cut %",
            statistics=_percent(lambda line: not line["finished"]),
            shown=("console",),
            chinese="截断 %",
        ),
        _lower("repeating", "repeating %", row=_repeating, shown=("console",), chinese="重复 %"),
        _lower(
            "answer_loss",
            "answer loss",
            statistics=_losses,
            from_losses=True,
            decimals=None,
            shown=("console",),
            chinese="回答损失",
        ),
        _lower(
            "answer_perplexity",
            "perplexity",
            statistics=_losses,
            figure=_perplexity,
            from_losses=True,
            decimals=None,
            chinese="困惑度",
        ),
    )
}
"""Every metric by its name, in the order of tables."""
