"""One pass over one data file: counts, lengths, hashes and problems, in memory that doesn't grow with the texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ptuning.data.encode import Encoder
from ptuning.data.formats import Record, Shape
from ptuning.data.guess import FormatOptions, Found, find_format
from ptuning.data.problems import Problem
from ptuning.data.records import iterate_records
from ptuning.data.rows import size, unit
from ptuning.errors import DataError
from ptuning.validation.lint import RowKeys, lint

_STEP = 16  # suggested lengths are multiples of this
_BATCH = 1024  # rows tokenised at once
_LINES = 20  # lines listed for each kind of finding


@dataclass
class Histogram:
    """How often each length occurs: what a million rows need to give their percentiles. Distinct lengths are few."""

    counts: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    longest_line: int = 0

    def add(self, length: int, line: int) -> None:
        self.counts[length] += 1
        if length > self.longest:
            self.longest, self.longest_line = length, line

    def merge(self, other: Histogram) -> None:
        """Adds the other's counts; the line of the longest loses its meaning."""
        self.counts.update(other.counts)
        self.longest = max(self.longest, other.longest)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def percentile(self, percent: float) -> int:
        """The least length that at least so many percent of the rows don't exceed."""
        wanted, seen = len(self) * percent / 100, 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= wanted:
                return length
        return 0

    def above(self, limit: int) -> int:
        """Rows longer than the limit."""
        return sum(count for length, count in self.counts.items() if length > limit)

    def suggested(self) -> int:
        """A limit that 99 % of the rows keep, or all of them where that costs at most a quarter more."""
        most, every = (-(-length // _STEP) * _STEP for length in (self.percentile(99), self.longest))
        return max(every if every <= 1.25 * most else most, _STEP)

    def to_dict(self, limit: int) -> dict[str, int]:
        """Percentiles, and the rows that `limit` cuts."""
        named = {f"p{percent}": self.percentile(percent) for percent in (50, 90, 95, 99)}
        return named | {
            "longest": self.longest,
            "longest_line": self.longest_line,
            "limit": limit,
            "cut": self.above(limit),
        }


@dataclass
class LintCount:
    """How many rows look wrong in one way, and where the first of them are."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < _LINES:
            self.lines.append(line)


@dataclass
class FileSurvey:
    """What one file holds.

    Args:
        unit: what the numbers of its rows count: line or row.
        failure: why the file, or the rest of it, can't be read; one message in the form of a problem.
        bad_rows: rows with at least one problem.
        turns: rows by the number of their question-answer pairs.
        prompts: lengths in tokens; empty without a tokenizer.
        trained_length: tokens of context that the model's dialogues were trained with; 0 without a tokenizer.
    """

    file: str
    unit: str = "line"
    found: Found | None = None
    failure: str | None = None
    rows: int = 0
    bad_rows: int = 0
    problems: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    systems: int = 0
    trained_length: int = 0
    prompts: Histogram = field(default_factory=Histogram)
    answers: Histogram = field(default_factory=Histogram)
    lint: dict[str, LintCount] = field(default_factory=dict)
    keys: RowKeys = field(default_factory=RowKeys)

    @property
    def good_rows(self) -> int:
        return self.rows - self.bad_rows

    def note(self, kind: str, line: int) -> None:
        self.lint.setdefault(kind, LintCount()).add(line)


def survey_file(
    file: str, options: FormatOptions, encoder: Encoder | None, tell: Callable[[Problem], None]
) -> FileSurvey:
    """Reads the file once, with a progress bar on a terminal's stderr.

    Args:
        file: its path.
        options: what is known of its format.
        encoder: measures prompts and answers; None leaves their lengths out.
        tell: is given each problem when it is found.
    """
    survey = FileSurvey(file, trained_length=0 if encoder is None else encoder.template.trained_length)
    try:
        survey.found, survey.unit = find_format(file, options), unit(file)
        with tqdm(total=size(file), desc=Path(file).name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            _read(survey, survey.found.shape, encoder, tell, lambda position: bar.update(position - bar.n))
        if not survey.rows:
            raise DataError(f"{file}: has 0 rows, at least 1 is needed: write rows into it")
    except DataError as error:
        survey.failure = str(error)
    return survey


def _read(
    survey: FileSurvey,
    shape: Shape,
    encoder: Encoder | None,
    tell: Callable[[Problem], None],
    progress: Callable[[int], object],
) -> None:
    batch: list[tuple[int, Record]] = []
    try:
        for example in iterate_records(survey.file, shape, progress):
            survey.rows += 1
            if example.record is None:
                survey.bad_rows += 1
                survey.problems += len(example.problems)
                for problem in example.problems:
                    tell(problem)
                continue
            batch.append((example.line, example.record))
            if len(batch) == _BATCH:
                _count(survey, batch, encoder)
                batch.clear()
    finally:  # also where the rest of the file can't be read
        _count(survey, batch, encoder)


def _count(survey: FileSurvey, batch: list[tuple[int, Record]], encoder: Encoder | None) -> None:
    for line, record in batch:
        survey.turns[len(record.history) + 1] += 1
        survey.systems += record.system is not None
        survey.keys.add(record, line)
        for kind in lint(record):
            survey.note(kind, line)
    if encoder is None:
        return
    lengths = encoder.measure([record for _, record in batch])
    for (line, _), (prompt, answer) in zip(batch, lengths, strict=True):
        survey.prompts.add(prompt, line)
        survey.answers.add(answer, line)
        if prompt + answer > survey.trained_length:
            survey.note("very_long", line)
