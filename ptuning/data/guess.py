"""Which format a data file has: as the flags say, or guessed from its first rows."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field, replace

from ptuning.data.formats import FORMATS, Columns, Format, Shape, is_list
from ptuning.data.problems import Problem, listed
from ptuning.data.rows import iterate_rows
from ptuning.data.source import Row
from ptuning.errors import ConfigError, DataError
from ptuning.messages import message

# (question, answer) columns of the collections that people have; compared without regard to case.
PAIRS = (
    ("content", "summary"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
    ("问题", "回答"),
    ("问题", "答案"),
    ("提问", "回答"),
    ("问", "答"),
)
HISTORY = ("history", "历史")
_SAMPLE = 100  # rows that a guess is made from
_NAMES = 1000  # column names remembered of one file


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the user said about the rows of a file; None and auto are guessed.

    Args:
        format: auto, columns, or a name in FORMATS.
        prompt: column of the question.
        response: column of the answer.
        history: column of the turns before.
        references: whether the rows must have answers.
    """

    format: str = "auto"
    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    references: bool = True

    def __post_init__(self) -> None:
        known = ["auto", "columns", *FORMATS]
        if self.format not in known:
            near = difflib.get_close_matches(self.format, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--data_format is {self.format!r}, use one of {', '.join(known)}{hint}")
        for flag, name in self.named:
            if self.format in FORMATS:
                raise ConfigError(
                    f"--data_format {self.format} with {flag} {name}: that format has its own column names; leave one of the "
                    "two out"
                )

    @property
    def named(self) -> list[tuple[str, str]]:
        """The columns that were named, as (command-line flag, column name)."""
        pairs = (("prompt", self.prompt), ("response", self.response), ("history", self.history))
        return [(f"--{kind}_column", name) for kind, name in pairs if name is not None]


@dataclass(frozen=True, slots=True)
class Found:
    """The shape of a file's rows, and whether it was guessed.

    Args:
        history_seen: False where no row that the guess looked at has a history, but later ones may.
    """

    shape: Shape
    guessed: bool
    history_seen: bool = True

    @property
    def format(self) -> str:
        """In the words of the options, the same in every language."""
        shape = self.shape
        if isinstance(shape, Columns) and not self.history_seen:
            shape = replace(shape, history=None)
        return str(shape)

    def __str__(self) -> str:
        return message("guessed", format=self.format) if self.guessed else self.format


@dataclass
class _Sample:
    first_line: int = 1
    rows: list[Row] = field(default_factory=list)
    names: dict[str, None] = field(default_factory=dict)  # in order of appearance


def find_format(path: str | os.PathLike[str], wanted: Columns | FormatOptions) -> Found:
    """How to read the file's rows.

    Raises:
        DataError: a named column is in no row; nothing known is found, or more than one thing; or the file can't be read.
    """
    file = os.fspath(path)
    if isinstance(wanted, Columns):
        return _checked(file, wanted)
    if wanted.format in FORMATS:
        return _checked(file, _shape(FORMATS[wanted.format], wanted))
    if wanted.prompt and (wanted.response or not wanted.references):
        return _checked(file, Columns(wanted.prompt, wanted.response, wanted.history))
    _require(file, wanted.named)
    sample = _sample(file)
    if not sample.rows:  # then every row has a problem of its own, and the names don't matter
        return Found(Columns("prompt", "response" if wanted.references else None), guessed=True)
    named = wanted.named or wanted.format == "columns"
    known = [_shape(shape, wanted) for shape in FORMATS.values()]
    found = [] if named else [shape for shape in known if shape.fits(sample.rows)]
    candidates: list[Shape] = [*found]
    if not any(known.owns_columns for known in found):
        candidates += _column_candidates(sample, wanted)
    if len(candidates) != 1:
        raise DataError(_undecided(file, sample, candidates, wanted))
    shape = candidates[0]
    return Found(shape, guessed=True, history_seen=getattr(shape, "history", None) in sample.names)


def _shape(known: Format, wanted: FormatOptions) -> Format:
    return known if wanted.references else known.unanswered()


def has_columns(path: str | os.PathLike[str], options: FormatOptions) -> bool:
    """Whether the first rows have the prompt and response columns that the options name."""
    return (
        bool(options.prompt and options.response)
        and {options.prompt, options.response} <= _sample(os.fspath(path)).names.keys()
    )


def _sample(file: str) -> _Sample:
    sample = _Sample()
    try:
        for line, row in iterate_rows(file):
            if isinstance(row, dict):
                sample.first_line = sample.first_line if sample.rows else line
                sample.rows.append(row)
                sample.names.update(dict.fromkeys(row))
            if len(sample.rows) == _SAMPLE:
                break
    except DataError:
        if not sample.rows:
            raise
        # Reading the rows will meet the same fault and say it.
    return sample


def _column_candidates(sample: _Sample, wanted: FormatOptions) -> list[Shape]:
    by_name = {name.strip().casefold(): name for name in sample.names}
    history = wanted.history or next((by_name[name] for name in HISTORY if name in by_name), HISTORY[0])
    # A file's first rows may well have no history yet. Where one of them has a list the column is the history, and a row
    # with something else in it is at fault; where none has, the column is something else of that name.
    values = [value for row in sample.rows if not _is_blank(value := row.get(history))]
    kept = history if wanted.history or not values or any(map(is_list, values)) else None
    pairs = []
    for prompt, response in PAIRS:
        pairs.append((wanted.prompt or by_name.get(prompt), wanted.response or by_name.get(response)))
    if not wanted.references:
        return [Columns(prompt, None, kept) for prompt in dict.fromkeys(prompt for prompt, _ in pairs) if prompt]
    return [
        Columns(prompt, response, kept)
        for prompt, response in dict.fromkeys(pairs)
        if prompt and response and prompt != response
    ]


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _undecided(file: str, sample: _Sample, candidates: list[Shape], wanted: FormatOptions) -> str:
    if candidates:
        found = " or ".join(str(candidate) for candidate in candidates)
        problem = f"the rows can be read in more than one way: {found}"
    else:
        kinds = ("prompt", "response") if wanted.references else ("prompt",)
        missing = [kind for kind in kinds if not getattr(wanted, kind)]
        problem = f"no known {' and '.join(missing)} column, the columns are {listed(list(sample.names))}"
    no_answers = not candidates and wanted.references and missing == ["response"]
    fix = (
        "name them with --prompt_column and --response_column" if wanted.references else "name it with --prompt_column"
    )
    if any(not isinstance(candidate, Columns) for candidate in candidates) or wanted.format == "auto":
        *names, last = FORMATS
        fix += f", or set --data_format to {', '.join(names)} or {last}"
    if no_answers:
        fix += "; to answer rows that have no answers yet: ptuning predict"
    return str(Problem(file, sample.first_line, "row", problem, fix))


def _checked(file: str, shape: Shape) -> Found:
    _require(file, shape.needed)
    return Found(shape, guessed=False)


def _require(file: str, needed: list[tuple[str, str]]) -> None:
    """Raises where a needed column is in no row. Stops reading as soon as each has been seen."""
    missing, first_line, objects = list(needed), 0, False
    names: dict[str, None] = {}
    if not missing:
        return
    for line, row in iterate_rows(file):
        first_line = first_line or line
        if isinstance(row, dict):
            objects = True
            if len(names) < _NAMES:
                names.update(dict.fromkeys(row))
            missing = [pair for pair in missing if pair[1] not in row]
            if not missing:
                return
    if objects:
        raise DataError("\n".join(str(_absent(file, first_line, flag, name, list(names))) for flag, name in missing))


def _absent(file: str, line: int, flag: str, name: str, names: list[str]) -> Problem:
    if flag == "--data_format":
        fix = "set --data_format to the format of the file, or leave it out to have it guessed"
    else:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        fix = f"set {flag} to the name it has in the file" + (f", maybe {near[0]!r}" if near else "")
    if len(names) == 1 and "|" in names[0]:
        fix = "separate the cells with commas when exporting the CSV"
    return Problem(file, line, name, f"no row has this column, the columns are {listed(names)}", fix)
