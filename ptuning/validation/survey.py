"""One pass over one data file: counts, lengths, hashes and problems, in memory that doesn't grow with the texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ptuning.data.encode import Encoder
from ptuning.data.formats import Found, Layout, find_format
from ptuning.data.problems import Problem
from ptuning.data.record import Record
from ptuning.data.records import iterate_records
from ptuning.errors import DataError
from ptuning.validation.histogram import Histogram
from ptuning.validation.keys import RowKeys
from ptuning.validation.oddities import TRAINED_LENGTH, oddities

_BATCH = 1024  # rows tokenised at once
_LINES = 20  # lines listed for each kind of oddity


@dataclass
class Oddity:
    """How many rows are odd in one way, and where the first of them are."""

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
        failure: why the file, or the rest of it, can't be read; one message in the form of a problem.
        bad_rows: rows with at least one problem.
        turns: rows by the number of their question-answer pairs.
        prompts: lengths in tokens; empty without a tokenizer.
    """

    file: str
    found: Found | None = None
    failure: str | None = None
    rows: int = 0
    bad_rows: int = 0
    problems: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    systems: int = 0
    prompts: Histogram = field(default_factory=Histogram)
    answers: Histogram = field(default_factory=Histogram)
    odd: dict[str, Oddity] = field(default_factory=dict)
    keys: RowKeys = field(default_factory=RowKeys)

    @property
    def good_rows(self) -> int:
        return self.rows - self.bad_rows

    def note(self, kind: str, line: int) -> None:
        self.odd.setdefault(kind, Oddity()).add(line)


def survey_file(file: str, layout: Layout, encoder: Encoder | None, tell: Callable[[Problem], None]) -> FileSurvey:
    """Reads the file once, with a progress bar on a terminal's stderr.

    Args:
        file: its path.
        layout: what is known of its format.
        encoder: measures prompts and answers; None leaves their lengths out.
        tell: is given each problem when it is found.
    """
    survey = FileSurvey(file)
    try:
        survey.found = find_format(file, layout)
        size = Path(file).stat().st_size
        with tqdm(total=size, desc=Path(file).name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            _read(survey, encoder, tell, lambda position: bar.update(position - bar.n))
        if not survey.rows:
            raise DataError(f"{file}: has 0 rows, at least 1 is needed: write rows into it")
    except DataError as error:
        survey.failure = str(error)
    return survey


def _read(
    survey: FileSurvey, encoder: Encoder | None, tell: Callable[[Problem], None], progress: Callable[[int], object]
) -> None:
    batch: list[tuple[int, Record]] = []
    try:
        for example in iterate_records(survey.file, survey.found.shape, progress):
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
        for kind in oddities(record):
            survey.note(kind, line)
    if encoder is None:
        return
    lengths = encoder.measure([record for _, record in batch])
    for (line, _), (prompt, answer) in zip(batch, lengths, strict=True):
        survey.prompts.add(prompt, line)
        survey.answers.add(answer, line)
        if prompt + answer > TRAINED_LENGTH:
            survey.note("very_long", line)
