"""Files of predictions: written line by line as the answers come, scored at the end, and read back."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ptuning.data.encode import EncodedRow
from ptuning.data.encoded import EncodedRows
from ptuning.data.formats import Record
from ptuning.data.problems import Problem, described, listed
from ptuning.distributed import from_all, is_divided, place_in_rows
from ptuning.errors import ConfigError, DataError
from ptuning.evaluation.answers import Answer, GenerationOptions, all_losses, generate_answers, own_rows
from ptuning.evaluation.metrics import row_metrics, row_scores, summarise
from ptuning.evaluation.model import EvaluatedModel
from ptuning.families import Template
from ptuning.messages import message
from ptuning.runs.folder import BASE, TUNED
from ptuning.runs.lines import ResumableLines, append, read_lines, write_lines

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "labels": str,
    "predict": str,
    "finished": bool,
    "tokens": (int, float),
}
_NAMES: dict[type | tuple[type, ...], str] = {str: "text", bool: "true or false", (int, float): "a number"}


@dataclass(frozen=True)
class Questions:
    """Records to answer, and the same ones encoded."""

    records: Sequence[Record]
    rows: EncodedRows


def predict(
    model: EvaluatedModel,
    template: Template,
    questions: Questions,
    options: GenerationOptions,
    max_target_length: int,
    path: Path,
    say: Callable[[str], None] = print,
    losses: bool = True,
    shows_bar: bool = True,
) -> dict[str, Any]:
    """Answers and scores every record.

    Each answer is appended as a JSON line {index, prompt, history, labels, predict, scores, …} to a part file beside
    `path` the moment it is there; a second call for the same model, records and options goes on where the first stopped.
    At the end `path` has all lines in the records' order; the part files stay until `delete_parts`, so that a run that is
    stopped later, while another model answers, needn't repeat these. Under several processes each answers its own rows, and
    all get the same scores.

    Args:
        max_target_length: tokens of a reference that the official mode scores against.
        path: the JSON lines file.
        say: prints on the main process.
        losses: also compute the references' losses, one more forward pass over the rows.
        shows_bar: draw a progress bar; during training the trainer's own is there.

    Returns:
        The scores of `metrics.summarise`.
    """
    state, records = PartialState(), questions.records
    settings = replace(options, batch_tokens=0)  # which doesn't change the answers
    scores = [metric.name for metric in row_metrics()]
    texts = [(record.prompt, record.history, record.response) for record in records]  # ids don't have what was cut off
    key = model.key(settings, max_target_length, scores, texts, questions.rows.sha256)

    def line_of(record: Record, answer: Answer) -> dict[str, Any]:
        reference = _reference(record.response or "", template, options, max_target_length)
        return {
            "prompt": record.prompt,
            "history": record.history,
            "labels": reference,
            "predict": answer.text,
            "scores": row_scores(answer.text, reference),
            "tokens": answer.tokens,
            "finished": answer.finished,
        }

    prompts = questions.rows.as_part("prompt")
    lines = answered_lines(
        model, template, records, prompts, options, ResumableLines(path, key), line_of, say, shows_bar
    )
    if losses:
        found = all_losses(model, questions.rows.as_part("answer"), template.pad_id)
        for line in lines:
            loss, line["loss_tokens"] = found[line["index"]]
            line["loss"] = round(loss, 4)  # batches of other processes differ in the seventh digit
    if state.is_main_process:
        write_lines(path, lines)
    state.wait_for_everyone()
    return summarise(lines)


def answered_lines(
    model: EvaluatedModel,
    template: Template,
    records: Sequence[Record],
    prompts: Sequence[EncodedRow],
    options: GenerationOptions,
    kept: ResumableLines,
    line_of: Callable[[Record, Answer], dict[str, Any]],
    say: Callable[[str], None],
    shows_bar: bool = True,
) -> list[dict[str, Any]]:
    """Answers every record that has no line yet, each process its own; a line is kept the moment its answer is there.

    Args:
        prompts: of the records.
        kept: the lines so far.
        line_of: what a line holds, beside its index.

    Returns:
        All lines in the records' order, on every process.
    """
    state = PartialState()
    if state.is_main_process:
        kept.discard_others()
    kept.key, done = broadcast_object_list([kept.key, kept.read() if state.is_main_process else None])
    if done:
        say(message("answered_before", file=kept.path.name, done=len(done), rows=len(records)))
    todo = own_rows([index for index in range(len(records)) if index not in done])
    answers = generate_answers(model, template, [prompts[i] for i in todo], options, numbers=todo, say=say)
    own = []
    shows_bar = shows_bar and state.is_main_process
    bar = tqdm(total=len(todo), desc=kept.path.stem, unit="row", leave=False, disable=not shows_bar)
    place, _ = place_in_rows()
    writes = state.is_main_process or not is_divided()  # the others have the same lines
    with kept.open(place) if writes else open(os.devnull, "w") as file, bar:  # noqa: PTH123
        for answer in answers:
            index = todo[answer.index]
            line = {"index": index, **line_of(records[index], answer)}
            append(file, line)
            own.append(line)
            bar.update()
    return sorted([*done.values(), *from_all(own)], key=lambda line: line["index"])


def _reference(text: str, template: Template, options: GenerationOptions, max_target_length: int) -> str:
    if not options.sample:
        return text
    # The official script scores against references cut at max_target_length.
    (ids,) = template.encode_text([text])
    return template.decode(ids[:max_target_length])


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
        if not isinstance(scores, dict) or not {metric.name for metric in row_metrics()} <= set(scores):
            row["scores"] = row_scores(row["predict"], row["labels"])
        lines.append(row)
    if not lines:
        raise DataError(f"{path}: has no lines: {fix}")
    return lines
