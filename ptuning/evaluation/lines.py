"""predictions.jsonl read back and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptuning.data.problems import Problem, described, listed
from ptuning.errors import ConfigError, DataError
from ptuning.evaluation.metrics import ROW_METRICS, row_scores
from ptuning.runs.folder import BASE, TUNED
from ptuning.runs.lines import read_lines

_FIELDS = {"prompt": str, "labels": str, "predict": str, "finished": bool, "tokens": (int, float)}
_NAMES = {str: "text", bool: "true or false", (int, float): "a number"}


def prediction_file(run: str, name: str | None = None) -> Path:
    """The predictions that are meant by a path on the command line.

    Args:
        run: a run folder, or the file itself.
        name: of the file in the folder; default: predictions.jsonl, or predictions_base.jsonl where that is missing.

    Raises:
        ConfigError: there is none.
    """
    path = Path(run)
    if path.is_file():
        return path
    if not path.exists():
        raise ConfigError(f"{run}: no such folder or file in {Path.cwd()}: give a run folder or a file of predictions")
    wanted = [name] if name is not None else [TUNED, BASE]
    for candidate in wanted:
        if (path / candidate).is_file():
            return path / candidate
    there = sorted(file.name for file in path.glob("*.jsonl"))
    fix = (
        f"name one of its files with --predictions: {listed(there)}"
        if there
        else "run `ptuning evaluate` into it first"
    )
    raise ConfigError(f"{run}: has no {' or '.join(wanted)}: {fix}")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The lines of a predictions file. Scores that an older version didn't write are computed now.

    Raises:
        DataError: it can't be read, has no lines, or a line lacks a field.
    """
    lines, fix = [], "write the file again with `ptuning evaluate`"
    for number, row in read_lines(path, fix):
        for field, kind in _FIELDS.items():
            if not isinstance(row.get(field), kind):
                found = f"is {described(row[field])}" if field in row else "is missing"
                problem = f"{found}, {_NAMES[kind]} is needed"
                raise DataError(str(Problem(str(path), number, field, problem, fix)))
        scores = row.get("scores")
        if not isinstance(scores, dict) or not set(ROW_METRICS) <= set(scores):
            row["scores"] = row_scores(row["predict"], row["labels"])
        lines.append(row)
    return lines
