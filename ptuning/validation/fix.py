"""`--fix OUT`: the clean rows of each file as JSON lines, and a list of what was left out and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ptuning.data.files import GZIP
from ptuning.data.records import iterate_records
from ptuning.data.rows import ENDINGS, stem
from ptuning.errors import ConfigError, DataError
from ptuning.validation.survey import FileSurvey


@dataclass(frozen=True)
class Outputs:
    """Where the clean rows of each input go, and where the list of dropped rows goes."""

    clean: dict[str, Path]
    dropped: Path


def plan_outputs(files: Sequence[str], out: str) -> Outputs:
    """OUT names a file where it ends in .jsonl or .json and there is one input, else a folder.

    Raises:
        ConfigError: an output exists, two inputs would become one output, or the name promises another format.
    """
    target = Path(out)
    if target.suffix.lower() in (*ENDINGS.keys() - {".json", ".jsonl"}, GZIP, ".txt"):
        raise ConfigError(
            f"--fix {out}: clean rows are written as JSON lines; end the name in .jsonl, or name a folder"
        )
    if target.suffix.lower() in (".json", ".jsonl"):
        if len(files) > 1:
            raise ConfigError(f"--fix {out}: there are {len(files)} input files; name a folder instead of a file")
        outputs = Outputs({files[0]: target}, target.with_name(f"{target.stem}.dropped.jsonl"))
    else:
        clean = {file: target / f"{stem(file)}.jsonl" for file in files}
        outputs = Outputs(clean, target / "dropped.jsonl")
    paths = [*outputs.clean.values(), outputs.dropped]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--fix {out}: {path} would be written twice; check files of equal names one at a time")
        if path.exists():
            raise ConfigError(
                f"--fix {out}: {path} exists, and nothing is overwritten; name another place or delete it"
            )
    return outputs


def write_clean(surveys: list[FileSurvey], outputs: Outputs) -> list[tuple[Path, int]]:
    """Writes the files, each under its final name only when it is whole. Rows stand as in the input, with all their
    columns; a row that repeats an earlier one of its file is dropped too.

    Returns:
        (file, rows) of what was written, the list of dropped rows last. A file without clean rows is not written.

    Raises:
        ConfigError: an output can't be written.
    """
    written, dropped = [], 0
    try:
        outputs.dropped.parent.mkdir(parents=True, exist_ok=True)
        part = outputs.dropped.with_name(f"{outputs.dropped.name}.part")
        with part.open("w", encoding="utf-8") as reasons:
            for survey in surveys:
                kept, left_out = _write_file(survey, outputs.clean[survey.file], reasons)
                dropped += left_out
                if kept:
                    written.append((outputs.clean[survey.file], kept))
        part.replace(outputs.dropped)
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: can't be written ({error.strerror}); name another place for --fix"
        ) from error
    return [*written, (outputs.dropped, dropped)]


def _write_file(survey: FileSurvey, target: Path, reasons: TextIO) -> tuple[int, int]:
    part = target.with_name(f"{target.name}.part")
    kept = dropped = 0

    def drop(line: int | None, why: list[str]) -> None:
        nonlocal dropped
        dropped += 1
        reasons.write(json.dumps({"file": survey.file, "line": line, "reasons": why}, ensure_ascii=False) + "\n")

    with part.open("w", encoding="utf-8") as clean:
        for line, row, why in _rows(survey):
            if row is None:
                drop(line, why)
            else:
                clean.write(_as_json(row) + "\n")
                kept += 1
    if kept:
        part.replace(target)
    else:
        part.unlink()
    if survey.failure:
        drop(None, [f"{survey.failure} (from there on nothing was read)"])
    return kept, dropped


def _rows(survey: FileSurvey) -> Iterator[tuple[int, dict | None, list[str]]]:
    """(line, row, reasons to drop it) once more from the file."""
    if survey.found is None:
        return
    numbers, firsts = survey.keys.repeated()
    repeated = iter(zip(numbers, firsts, strict=True))
    next_repeated, first = next(repeated, (-1, -1))
    number = 0
    try:
        for example in iterate_records(survey.file, survey.found.shape):
            if example.record is None:
                yield example.line, None, [f"{p.field}: {p.problem}: {p.fix}" for p in example.problems]
                continue
            if number == next_repeated:
                yield example.line, None, [f"the same as {survey.unit} {survey.keys.lines[first]}"]
                next_repeated, first = next(repeated, (-1, -1))
            else:
                yield example.line, example.row, []
            number += 1
    except DataError:
        return  # the survey met it first, and has its message


def _as_json(row: dict) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)  # Arrow has dates and the like
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a character in a column that is not read
        return json.dumps(row, default=str)
    return text
