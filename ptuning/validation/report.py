"""What the surveys found, as text for people and as JSON for machines."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from ptuning.data.encode import Lengths
from ptuning.data.problems import Problem
from ptuning.language import padded
from ptuning.messages import note
from ptuning.validation.lint import Overlap, overlap
from ptuning.validation.survey import FileSurvey, Histogram
from ptuning.validation.words import words

_SHOWN = 5  # lines named in one sentence


def file_text(survey: FileSurvey, lengths: Lengths) -> str:
    """The figures of one file."""
    problems = words("one_problem") if survey.problems == 1 else words("problems", count=survey.problems)
    bad = words("bad", problems=problems, rows=_rows(survey.bad_rows)) if survey.problems else ""
    format = words("format", format=survey.found) if survey.found else ""
    lines = [words("file", file=survey.file, rows=_rows(survey.rows), bad=bad, format=format)]
    if survey.failure and survey.rows:
        lines.append(words("until_the_fault"))
    if not survey.good_rows:
        return lines[0]
    turns = words("turns_comma").join(
        words("rows_of_turns", turns=number, rows=_rows(rows)) for number, rows in sorted(survey.turns.items())[:_SHOWN]
    )
    more = words("more_turns", turns=max(survey.turns)) if len(survey.turns) > _SHOWN else ""
    systems = words("systems", rows=_rows(survey.systems)) if survey.systems else ""
    lines.append(words("turns", turns=turns, more=more, systems=systems))
    if survey.prompts:
        heads = [words("median"), "90%", "95%", "99%"]
        figures = "".join(padded(head, 7, ">") for head in heads) + padded(words("longest"), 9, ">")
        lines.append(f"  {padded(words('tokens'), 9)}{figures}")
        lines += [
            _lengths_text("prompts", survey.unit, survey.prompts, "--max_source_length", lengths.max_source_length),
            _lengths_text("answers", survey.unit, survey.answers, "--max_target_length", lengths.max_target_length),
        ]
    lines += [f"  {note(text)}" for text in _notes(survey)]
    return "\n".join(lines)


def _lengths_text(what: str, unit: str, histogram: Histogram, flag: str, limit: int) -> str:
    figures = "".join(f"{histogram.percentile(percent):>7}" for percent in (50, 90, 95, 99)) + f"{histogram.longest:>9}"
    cut = histogram.above(limit)
    return words(
        "lengths",
        what=padded(words(what), 9),
        figures=figures,
        place=words(unit, number=histogram.longest_line),
        cut=cut,
        share=words("share", share=_percent(cut, len(histogram))) if cut else "",
        flag=flag,
        limit=limit,
    )


def _notes(survey: FileSurvey) -> list[str]:
    notes, unit = [], survey.unit
    numbers, firsts = survey.keys.repeated()
    if len(numbers):
        lines = survey.keys.lines
        pairs = [
            f"{words(unit, number=lines[n])} = {words(unit, number=lines[f])}"
            for n, f in zip(numbers[:_SHOWN], firsts[:_SHOWN], strict=True)
        ]
        shown, count = _some(pairs, len(numbers)), len(numbers)
        notes.append(words("one_repeat", pairs=shown) if count == 1 else words("repeats", count=count, pairs=shown))
    for kind, found in survey.lint.items():
        places = words(f"several_{unit}", numbers=_some([str(line) for line in found.lines], found.count))
        meaning = words(kind, limit=survey.trained_length, example="锟斤拷")
        notes.append(words("odd", rows=_rows(found.count), meaning=meaning, places=places))
    for count, line in _frequent_answers(survey):
        notes.append(words("frequent", count=count, place=words(unit, number=line)))
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
    text = words(
        "overlap",
        questions=shared.questions,
        rows=other.good_rows,
        other=other.file,
        one=one.file,
        same=shared.rows,
        examples=_some(examples, shared.questions),
    )
    return note(text)


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
    cut = {what: _percent(found[f"cut_{what}"], found["rows"]) for what in ("prompts", "answers")}
    return words("suggested", source=found["max_source_length"], target=found["max_target_length"], **cut)


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


def _rows(count: int) -> str:
    return words("one_row") if count == 1 else words("rows", count=count)


def _some(shown: list[str], total: int) -> str:
    text = ", ".join(shown)
    return words("and_more", shown=text, count=total - len(shown)) if total > len(shown) else text


def _percent(part: int, whole: int) -> str:
    if not part:
        return words("none")
    share = 100 * part / whole
    return words("under") if share < 0.05 else f"{share:.1f}%"
