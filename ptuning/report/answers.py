"""Which answers to show: of the predictions the best, the worst and some at random; of the forgetting probe the first of each kind.

A test file of 100,000 rows has predictions of hundreds of megabytes, so only score, row number and byte offset are kept of
each line; the lines chosen are read again.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.evaluation.metrics import ranking
from ptuning.report.text import number
from ptuning.runs import RunFolder
from ptuning.runs.folder import BASE, PROBE, PROBE_BASE, TUNED
from ptuning.runs.lines import Lines, part_files

SHOWN = 5  # of each kind
SEED = 42

SHOWN_OF_A_KIND = 8
SHOWN_KINDS = 20


# --- predictions ----------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """One model's answer to one row."""

    text: str
    scores: dict[str, float]
    tokens: float | None
    finished: bool | None
    loss: float | None  # of the reference, a token

    @classmethod
    def of(cls, line: dict) -> "Answer":
        scores = line.get("scores")
        finished = line.get("finished")
        loss, loss_tokens = (
            number(line.get("loss")),
            number(line.get("loss_tokens")),
        )  # summed over the reference's tokens
        return cls(
            text=as_text(line.get("predict")),
            scores={str(key): value for key, value in scores.items() if number(value) is not None}
            if isinstance(scores, dict)
            else {},
            tokens=number(line.get("tokens")),
            finished=finished if isinstance(finished, bool) else None,
            loss=loss / loss_tokens if loss is not None and loss_tokens else None,
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


def read_predictions(folder: RunFolder) -> Predictions:
    """The predictions in a run folder; where an evaluation was cut off, its part files."""
    found = Predictions()
    files = {"tuned": _files(folder / TUNED), "base": _files(folder / BASE)}
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
                found.metric = found.metric or next(
                    (m.name for m in ranking() if number(scores.get(m.name)) is not None), None
                )
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


def _files(whole: Path) -> list[Path]:
    """The finished file, or the part files of an evaluation that began after it was written."""
    try:
        written = whole.stat().st_mtime if whole.is_file() else 0.0
        newer = [part for part in part_files(whole) if part.is_file() and part.stat().st_mtime > written]
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


# --- forgetting probe -----------------------------------------------------------------------------------------------------


@dataclass
class ProbeKind:
    """All questions of one kind."""

    name: str
    rows: int = 0
    same: int = 0  # the tuned model answers word for word as the base did
    losses: list[tuple[float, float]] = field(default_factory=list)  # of the base's answer: (before, after)
    examples: list[dict] = field(default_factory=list)  # the first rows: prompt, base, tuned, base_loss, tuned_loss

    @property
    def base_loss(self) -> float | None:
        """Mean loss of the base's own answers under the base."""
        return sum(before for before, _ in self.losses) / len(self.losses) if self.losses else None

    @property
    def tuned_loss(self) -> float | None:
        """The same answers' mean loss under the tuned model."""
        return sum(after for _, after in self.losses) / len(self.losses) if self.losses else None

    @property
    def change(self) -> float | None:
        """How much less likely the base's answers have become."""
        before, after = self.base_loss, self.tuned_loss
        return None if before is None or after is None else after - before


@dataclass
class Probe:
    """The probe by kind, with all of them together as `total`."""

    kinds: list[ProbeKind] = field(default_factory=list)
    total: ProbeKind = field(default_factory=lambda: ProbeKind("all"))
    more_kinds: int = 0
    bad: int = 0
    only_base: int = 0  # questions that the base has answered, where the tuned model's answers are missing


def read_probe(folder: RunFolder) -> Probe:
    """probe.jsonl, grouped by kind; empty where it is missing."""
    kinds: dict[str, ProbeKind] = {}
    probe, lines = Probe(), Lines(folder / PROBE)
    for _, line in lines:
        name = as_text(line.get("kind"))[:60] or "other"
        kind = kinds.setdefault(name, ProbeKind(name))
        base, tuned = as_text(line.get("base")), as_text(line.get("tuned"))
        before, after = number(line.get("base_loss")), number(line.get("tuned_loss"))
        for group in (kind, probe.total):
            group.rows += 1
            group.same += base == tuned
            if before is not None and after is not None:
                group.losses.append((before, after))
        if len(kind.examples) < SHOWN_OF_A_KIND:
            prompt = as_text(line.get("prompt"))
            kind.examples.append(
                {"prompt": prompt, "base": base, "tuned": tuned, "base_loss": before, "tuned_loss": after}
            )
    if not kinds:
        probe.only_base = sum(1 for _ in Lines(folder / PROBE_BASE))
    probe.bad = lines.bad
    probe.kinds = list(kinds.values())[:SHOWN_KINDS]
    probe.more_kinds = max(0, len(kinds) - SHOWN_KINDS)
    return probe
