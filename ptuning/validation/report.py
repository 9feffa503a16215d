"""What the surveys found, as text for people and as JSON for machines."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from ptuning.data.encode import Lengths
from ptuning.data.problems import Problem
from ptuning.validation.lint import MEANING, Overlap, overlap
from ptuning.validation.survey import FileSurvey, Histogram

_SHOWN = 5  # lines named in one sentence


def file_text(survey: FileSurvey, lengths: Lengths) -> str:
    """The figures of one file."""
    problems = "1 problem" if survey.problems == 1 else f"{survey.problems:,} problems"
    bad = f", {problems} in {_rows(survey.bad_rows)}" if survey.problems else ""
    lines = [f"{survey.file}: {_rows(survey.rows)}{bad}" + (f" ({survey.found})" if survey.found else "")]
    if survey.failure and survey.rows:
        lines.append("  the figures are those of the rows before the fault")
    if not survey.good_rows:
        return lines[0]
    turns = ", ".join(f"{number} in {_rows(rows)}" for number, rows in sorted(survey.turns.items())[:_SHOWN])
    more = f", up to {max(survey.turns)}" if len(survey.turns) > _SHOWN else ""
    systems = f"; a system text in {_rows(survey.systems)}" if survey.systems else ""
    lines.append(f"  turns: {turns}{more}{systems}")
    if survey.prompts:
        lines.append(f"  tokens   {'median':>7}{'90%':>7}{'95%':>7}{'99%':>7}{'longest':>9}")
        lines += [
            _lengths_text("prompts", survey.unit, survey.prompts, "--max_source_length", lengths.max_source_length),
            _lengths_text("answers", survey.unit, survey.answers, "--max_target_length", lengths.max_target_length),
        ]
    lines += [f"  note: {note}" for note in _notes(survey)]
    return "\n".join(lines)


def _lengths_text(what: str, unit: str, histogram: Histogram, flag: str, limit: int) -> str:
    figures = "".join(f"{histogram.percentile(percent):>7}" for percent in (50, 90, 95, 99))
    cut = histogram.above(limit)
    share = f" ({_percent(cut, len(histogram))})" if cut else ""
    return f"  {what:<9}{figures}{histogram.longest:>9} ({unit} {histogram.longest_line}); {cut:,} cut{share} at {flag} {limit}"


def _notes(survey: FileSurvey) -> list[str]:
    notes, unit = [], survey.unit
    numbers, firsts = survey.keys.repeated()
    if len(numbers):
        lines = survey.keys.lines
        pairs = [
            f"{unit} {lines[n]} = {unit} {lines[f]}" for n, f in zip(numbers[:_SHOWN], firsts[:_SHOWN], strict=True)
        ]
        notes.append(f"{_rows(len(numbers), 'repeats', 'repeat')} an earlier row: {_some(pairs, len(numbers))}")
    for kind, found in survey.lint.items():
        shown = [str(line) for line in found.lines]
        notes.append(f"{_rows(found.count)}: {MEANING[kind]}: {unit}s {_some(shown, found.count)}")
    for count, line in _frequent_answers(survey):
        notes.append(f"{count:,} rows have the same answer, the first at {unit} {line}")
    return notes


def _frequent_answers(survey: FileSurvey) -> list[tuple[int, int]]:
    return survey.keys.frequent_answers(max(10, survey.good_rows // 20))[:3]


def overlaps(surveys: list[FileSurvey]) -> list[tuple[FileSurvey, FileSurvey, Overlap]]:
    """What each two files share, where they share anything."""
    found = [(one, other, overlap(one.keys, other.keys)) for one, other in combinations(surveys, 2)]
    return [(one, other, shared) for one, other, shared in found if shared.questions]


def overlap_text(one: FileSurvey, other: FileSurvey, shared: Overlap) -> str:
    """One note for two files."""
    examples = [f"{other.file}:{there} = {one.file}:{here}" for here, there in shared.examples]
    return (
        f"note: {shared.questions:,} of {other.good_rows:,} questions of {other.file} also stand in {one.file}, {shared.rows:,} "
        f"with the same answer: {_some(examples, shared.questions)}; scores on them measure memory: take them out of one file"
    )


def suggestion(surveys: list[FileSurvey]) -> dict[str, Any] | None:
    """Lengths for all files together, and the rows they would cut; None without token lengths."""
    prompts, answers = Histogram(), Histogram()
    for survey in surveys:
        prompts.merge(survey.prompts)
        answers.merge(survey.answers)
    if not prompts:
        return None
    source, target = prompts.suggested(), answers.suggested()
    return {
        "max_source_length": source,
        "max_target_length": target,
        "rows": len(prompts),
        "cut_prompts": prompts.above(source),
        "cut_answers": answers.above(target),
    }


def suggestion_text(found: dict[str, Any]) -> str:
    """The suggestion as flags."""
    cut = " and ".join(
        f"{_percent(found[f'cut_{what}'], found['rows'])} of the {what}" for what in ("prompts", "answers")
    )
    return (
        f"suggested: --max_source_length {found['max_source_length']} --max_target_length {found['max_target_length']} "
        f"(cuts {cut})"
    )


def file_values(survey: FileSurvey, lengths: Lengths, problems: list[Problem]) -> dict[str, Any]:
    """The figures of one file for --json.

    Args:
        problems: the first of them; `problem_count` counts all.
    """
    numbers, firsts = survey.keys.repeated()
    lines = survey.keys.lines
    return {
        "file": survey.file,
        "format": None if survey.found is None else str(survey.found.shape),
        "guessed": survey.found is not None and survey.found.guessed,
        "failure": survey.failure,
        "rows": survey.rows,
        "bad_rows": survey.bad_rows,
        "problem_count": survey.problems,
        "problems": [
            {"line": p.line, "field": p.field, "problem": p.problem, "fix": p.fix}
            for p in problems
            if p.file == survey.file
        ],
        "turns": {str(number): rows for number, rows in sorted(survey.turns.items())},
        "system_rows": survey.systems,
        "prompt_tokens": survey.prompts.to_dict(lengths.max_source_length) if survey.prompts else None,
        "answer_tokens": survey.answers.to_dict(lengths.max_target_length) if survey.answers else None,
        "repeated_rows": len(numbers),
        "repeated": [[lines[n], lines[f]] for n, f in zip(numbers[:100], firsts[:100], strict=True)],
        "odd": {kind: {"rows": found.count, "lines": found.lines} for kind, found in survey.lint.items()},
        "frequent_answers": [{"rows": count, "line": line} for count, line in _frequent_answers(survey)],
    }


def _rows(count: int, one: str = "", many: str = "") -> str:
    return f"1 row {one}".strip() if count == 1 else f"{count:,} rows {many}".strip()


def _some(shown: list[str], total: int) -> str:
    text = ", ".join(shown)
    return f"{text} and {total - len(shown):,} more" if total > len(shown) else text


def _percent(part: int, whole: int) -> str:
    if not part:
        return "none"
    share = 100 * part / whole
    return "under 0.1%" if share < 0.05 else f"{share:.1f}%"
