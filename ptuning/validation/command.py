"""`ptuning validate-data FILE…`"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tqdm import tqdm

from ptuning.config import DataArguments
from ptuning.config.commands import option, parse_options, same_option
from ptuning.data.encode import Encoder, Lengths
from ptuning.data.guess import FormatOptions
from ptuning.data.problems import Problem
from ptuning.errors import ConfigError
from ptuning.loading import load_template
from ptuning.messages import note, silent
from ptuning.validation import report
from ptuning.validation.fix import plan_outputs, write_clean
from ptuning.validation.survey import survey_file
from ptuning.validation.words import words

_LISTED = 10_000  # problems in the answer to --json; --fix lists them all


_ABOUT = (
    "Checks data files before they are trained on: exit status 0 if every row can be used, 1 if there are problems "
    "(file:line: field: problem: fix), 2 for wrong options."
)


@dataclass(frozen=True)
class ValidateOptions:
    """Which files, how to read them, and what to do with what is found."""

    files: tuple[str, ...] = option(..., "train, dev, test: what --train_file takes", positional=True)
    model_name_or_path: str | None = option(None, "whose tokenizer measures the lengths; without it none are measured")
    data_format: str = same_option(DataArguments, "data_format")
    prompt_column: str | None = same_option(DataArguments, "prompt_column")
    response_column: str | None = same_option(DataArguments, "response_column")
    history_column: str | None = same_option(DataArguments, "history_column")
    source_prefix: str = same_option(DataArguments, "source_prefix")
    max_source_length: int = same_option(DataArguments, "max_source_length")
    max_target_length: int = same_option(DataArguments, "max_target_length")
    fix: str | None = option(
        None,
        "write the clean rows there (x.jsonl for one FILE, else a folder), without repeated ones, and a list of the others",
    )
    json: bool = option(False, "one JSON object instead of text")


def validate_command(argv: list[str]) -> int:
    """Checks data files and says what is in them.

    Args:
        argv: without the program's name and the command.

    Returns:
        0 where every row can be trained on, 1 where there are problems.

    Raises:
        PTuningError: an option or the tokenizer can't be used.
    """
    args = parse_options(ValidateOptions, argv, "ptuning validate-data", _ABOUT)
    repeated = sorted({file for file in args.files if args.files.count(file) > 1})
    if repeated:
        raise ConfigError(f"{repeated[0]} is given {args.files.count(repeated[0])} times; give each file once")
    options = FormatOptions(args.data_format, args.prompt_column, args.response_column, args.history_column)
    lengths = Lengths(args.max_source_length, args.max_target_length)
    outputs = None if args.fix is None else plan_outputs(args.files, args.fix)
    encoder = None
    if args.model_name_or_path is not None:
        encoder = Encoder(load_template(args.model_name_or_path), lengths, args.source_prefix)
    say = silent if args.json else print
    kept: list[Problem] = []

    def tell(problem: Problem) -> None:
        if not args.json:
            tqdm.write(str(problem))  # which leaves the progress bar whole
        elif len(kept) < _LISTED:
            kept.append(problem)

    surveys = []
    for file in args.files:
        survey = survey_file(file, options, encoder, tell)
        surveys.append(survey)
        if survey.failure:
            say(survey.failure)
        if survey.found is not None and survey.rows:
            say(report.file_text(survey, lengths))
    shared = report.overlaps(surveys)
    for found in shared:
        say(report.overlap_text(*found))
    suggested = report.suggestion(surveys)
    if suggested is not None:
        say(report.suggestion_text(suggested))
    elif encoder is None:
        say(note(words("no_lengths")))
    written = [] if outputs is None else write_clean(surveys, outputs)
    for path, rows in written:
        left_out = outputs is not None and path == outputs.dropped
        say(words("wrote_left_out" if left_out else "wrote", path=path, rows=rows))
    bad = any(survey.failure or survey.problems for survey in surveys)
    if args.json:
        values = {
            "ok": not bad,
            "files": [report.file_values(survey, lengths, kept) for survey in surveys],
            "overlaps": [
                {
                    "first": one.file,
                    "second": other.file,
                    "rows": both.rows,
                    "questions": both.questions,
                    "lines": both.examples,
                }
                for one, other, both in shared
            ],
            "suggested": suggested,
            "written": {str(path): rows for path, rows in written},
        }
        print(json.dumps(values, ensure_ascii=False, indent=2))
    return 1 if bad else 0
