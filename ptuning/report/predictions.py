"""Which answers to show: the best, the worst and some at random, read by streaming.

A test file of 100,000 rows has predictions of hundreds of megabytes, so only score, row number and byte offset are kept of
each line; the lines chosen are read again.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.report.lines import Lines, number

SHOWN = 5  # of each kind
RANKING = ("rouge-l", "bleu-4", "rouge-1", "chrf", "token_f1")
SEED = 42


@dataclass
class Answer:
    """One model's answer to one row."""

    text: str
    scores: dict[str, float]
    tokens: int | None
    finished: bool | None
    loss: float | None  # of the reference, a token

    @classmethod
    def of(cls, line: dict) -> "Answer":
        scores = line.get("scores") if isinstance(line.get("scores"), dict) else {}
        finished = line.get("finished")
        loss, tokens = number(line.get("loss")), number(line.get("loss_tokens"))  # summed over the reference's tokens
        return cls(
            text=as_text(line.get("predict")),
            scores={str(key): value for key, value in scores.items() if number(value) is not None},
            tokens=number(line.get("tokens")),
            finished=finished if isinstance(finished, bool) else None,
            loss=loss / tokens if loss is not None and tokens else None,
        )


@dataclass
class Example:
    """A row with its reference and the answers that are there."""

    index: int
    prompt: str
    history: list[tuple[str, str]]
    reference: str
    base: Answer | None
    tuned: Answer | None


@dataclass
class Predictions:
    """The chosen rows, and the scores of all for their distribution."""

    rows: dict[str, int] = field(default_factory=dict)  # model → number of answers
    bad: int = 0  # lines that could not be read
    partial: bool = False  # read from the part files of an evaluation that did not end
    metric: str | None = None  # what best and worst go by
    ranked_by: str | None = None  # whose scores
    scores: dict[str, list[float]] = field(default_factory=dict)  # model → that metric, row by row
    groups: dict[str, list[Example]] = field(default_factory=dict)  # "Best", "Worst", "Random" → rows


def read_predictions(folder: Path) -> Predictions:
    """The predictions in a run folder; where an evaluation was cut off, its part files."""
    found = Predictions()
    files = {"tuned": _files(folder, "predictions"), "base": _files(folder, "predictions_base")}
    places: dict[str, dict[int, tuple[Lines, int]]] = {}
    ranks: dict[str, dict[int, float]] = {}
    for model, paths in files.items():
        places[model], ranks[model] = {}, {}
        for path in paths:
            found.partial |= ".part" in path.name
            lines = Lines(path)
            for offset, line in lines:
                index = line.get("index")
                if index is None and "key" in line:  # the head of a part file
                    continue
                if isinstance(index, bool) or not isinstance(index, int):
                    lines.bad += 1
                    continue
                places[model][index] = (lines, offset)
                scores = line.get("scores")
                if not isinstance(scores, dict):
                    continue
                found.metric = found.metric or next((m for m in RANKING if number(scores.get(m)) is not None), None)
                value = number(scores.get(found.metric)) if found.metric else None
                if value is not None:
                    ranks[model][index] = value
            found.bad += lines.bad
    found.rows = {model: len(there) for model, there in places.items() if there}
    found.scores = {model: list(values.values()) for model, values in ranks.items() if values}
    found.ranked_by = next((model for model in ("tuned", "base") if ranks[model]), None)
    for name, indexes in _choose(ranks[found.ranked_by] if found.ranked_by else {}, places).items():
        found.groups[name] = [_example(index, places) for index in indexes]
    return found


def _files(folder: Path, stem: str) -> list[Path]:
    """The finished file, or the part files of an evaluation that began after it was written."""
    whole = folder / f"{stem}.jsonl"
    parts = sorted(folder.glob(f"{stem}.part*"))
    try:
        written = whole.stat().st_mtime if whole.is_file() else 0.0
        newer = [part for part in parts if part.is_file() and part.stat().st_mtime > written]
    except OSError:  # gone between the two calls: the evaluation has just ended
        newer = []
    return newer or ([whole] if whole.is_file() else [])


def _choose(ranks: dict[int, float], places: dict[str, dict]) -> dict[str, list[int]]:
    """Row numbers of each group. No row is in two of them."""
    order = sorted(ranks, key=lambda index: (-ranks[index], index))
    best = order[:SHOWN]
    worst = order[SHOWN:][-SHOWN:][::-1]
    rest = sorted({index for there in places.values() for index in there} - {*best, *worst})
    drawn = sorted(random.Random(SEED).sample(rest, min(SHOWN, len(rest))))
    groups = {"Best": best, "Worst": worst, "Random": drawn}
    return {name: indexes for name, indexes in groups.items() if indexes}


def _example(index: int, places: dict[str, dict[int, tuple[Lines, int]]]) -> Example:
    lines = {}
    for model, there in places.items():
        if index in there:
            file, offset = there[index]
            lines[model] = file.at(offset)
    about = lines.get("tuned") or lines.get("base") or {}
    return Example(
        index=index,
        prompt=as_text(about.get("prompt")),
        history=_history(about.get("history")),
        reference=as_text(about.get("labels")),
        base=Answer.of(lines["base"]) if "base" in lines else None,
        tuned=Answer.of(lines["tuned"]) if "tuned" in lines else None,
    )


def _history(value) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        return []
    return [(as_text(turn[0]), as_text(turn[1])) for turn in value if isinstance(turn, list) and len(turn) == 2]


def as_text(value) -> str:
    """Text of a field that should be text."""
    return "" if value is None else value if isinstance(value, str) else str(value)
