"""`ptuning compare`: two runs on the same rows, and whether their difference is more than noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptuning.config.commands import option, parse_options
from ptuning.data.problems import quoted
from ptuning.errors import ConfigError, DataError
from ptuning.evaluation.corpus import RESAMPLES, percentile_interval
from ptuning.evaluation.metrics import METRICS, Lines, Measurement, Metric, measure
from ptuning.evaluation.predictions import prediction_file, read_predictions
from ptuning.language import columns, padded
from ptuning.messages import message
from ptuning.runs.folder import BASE, TUNED

FEWEST_ROWS = 20  # measured: below it "more than noise" is said too often of two equal models (docs/evaluation.md)

# As --json has them; their words are in ptuning.messages.
MORE, NOT_MORE, TOO_FEW = "more than noise", "not more than noise", "too few rows"


@dataclass(frozen=True)
class CompareOptions:
    """What to compare."""

    run_a: str = option(..., "run folder or predictions file; alone: its base against it", positional=True)
    run_b: str | None = option(None, "run folder or predictions file", positional=True)
    predictions: str | None = option(None, f"file in the folders; default: {TUNED}, else {BASE}")
    json: bool = option(False, "print JSON instead of the table")


def compare_command(argv: Sequence[str]) -> int:
    """`ptuning compare RUN_A [RUN_B]`: prints the table, or JSON. Returns the exit status.

    Raises:
        ConfigError: a run has no predictions.
        DataError: a file can't be read, or the rows differ.
    """
    args = parse_options(CompareOptions, argv, "ptuning compare")
    if args.run_b is None:
        first, second = _own_base(args.run_a, args.predictions)
    else:
        first, second = (prediction_file(run, args.predictions) for run in (args.run_a, args.run_b))
    a, b = read_predictions(first), read_predictions(second)
    require_same_rows(first, a, second, b)
    result = {"a": str(first), "b": str(second), "rows": len(a), "metrics": compare(a, b)}
    print(json.dumps(result, ensure_ascii=False, indent=2) if args.json else comparison_table(result))
    return 0


def _own_base(run: str, name: str | None) -> tuple[Path, Path]:
    if Path(run).is_file():
        raise ConfigError(f"{run} is one file: give a second one to compare it with, or a run folder")
    tuned = prediction_file(run, name or TUNED)
    if not (Path(run) / BASE).is_file():
        raise ConfigError(
            f"{run}: has no {BASE} to compare {tuned.name} with: evaluate with --baseline, or give a second run"
        )
    return Path(run) / BASE, tuned


def require_same_rows(first: Path, a: Lines, second: Path, b: Lines) -> None:
    """Differences of single rows mean something only where both models answered the same questions.

    Raises:
        DataError: naming the first row that differs.
    """
    fix = (
        "evaluate both with the same --test_file, --max_predict_samples, --max_target_length and --generation_mode "
        "(the official mode cuts references)"
    )
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        for field in ("prompt", "labels", "history"):
            # Older files have no history.
            if field in left and field in right and left[field] != right[field]:
                raise DataError(
                    f"{first} and {second} answer different rows: {field} of row {index} is "
                    f"{quoted(str(left[field]))} and {quoted(str(right[field]))}: {fix}"
                )
    if len(a) != len(b):
        rows = "1 row" if len(a) == 1 else f"{len(a)} rows"
        raise DataError(f"{first} has {rows} and {second} has {len(b)}: {fix}")


def compare(a: Lines, b: Lines) -> dict[str, dict[str, Any]]:
    """Paired bootstrap: each resample draws the same rows of both.

    Args:
        a, b: predictions for the same rows, in the same order.

    Returns:
        For each metric that both have {"a", "b", "difference" (b - a), "interval" (95 %, of the difference), "verdict"
        (MORE, NOT_MORE or TOO_FEW), "better" ("a", "b", or None where the metric doesn't say, or it may be noise)}.
    """
    first, second = measure(a), measure(b)
    return {
        name: _difference(metric, len(a), first[name], second[name])
        for name, metric in METRICS.items()
        if name in first and name in second
    }


def _difference(metric: Metric, rows: int, first: Measurement, second: Measurement) -> dict[str, Any]:
    difference = second.value - first.value
    low, high = percentile_interval(second.samples - first.samples)
    verdict = TOO_FEW if rows < FEWEST_ROWS else MORE if low > 0 or high < 0 else NOT_MORE
    better = None
    if verdict == MORE and metric.better:
        better = "b" if (difference > 0) == (metric.better == "higher") else "a"
    return {
        "a": round(first.value, 4),
        "b": round(second.value, 4),
        "difference": round(difference, 4),
        "interval": [low, high],
        "verdict": verdict,
        "better": better,
    }


def comparison_table(result: Mapping[str, Any]) -> str:
    """The result of `compare_command` as text."""
    rows = [("", "A", "B", "B - A", message("interval_head"), message("verdict"))]
    for name, one in result["metrics"].items():
        metric = METRICS[name]
        values = (metric.text(one["a"]), metric.text(one["b"]), metric.text(one["difference"], sign="+"))
        interval = f"[{', '.join(metric.text(limit) for limit in one['interval'])}]"
        better = message("is_better", run=one["better"].upper()) if one["better"] else ""
        rows.append((metric.title, *values, interval, f"{message(one['verdict'])}{better}"))
    label, *numbers, _ = (max(map(columns, column)) for column in zip(*rows, strict=True))
    lines = [f"A: {result['a']}", f"B: {result['b']}", _rows(result["rows"]), ""]
    for name, *cells, verdict in rows:
        texts = (padded(cell, width, ">") for cell, width in zip(cells, numbers, strict=True))
        lines.append("  ".join([padded(name, label), *texts, verdict]))
    lines += ["", _note(result["rows"], len(result["metrics"]))]
    return "\n".join(lines)


def _note(rows: int, metrics: int) -> str:
    if rows < FEWEST_ROWS:
        return message("too_few_to_tell", rows=_rows(rows), least=FEWEST_ROWS)
    return message("about_bootstrap", resamples=RESAMPLES, metrics=metrics)


def _rows(count: int) -> str:
    return message("one_row") if count == 1 else message("several_rows", count=count)
