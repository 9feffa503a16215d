"""Records → token ids and labels, exactly as the official scripts encode what fits, and without their traps where it doesn't.

Source: THUDM/ChatGLM2-6B `ptuning/main.py`, preprocess_function_train: [gMASK] sop prompt, then the answer, then eos;
loss on the answer and eos only. The official code cuts a long prompt on the right, which removes "答：" and the newest
turn, and gives a cut answer an eos, which teaches early stops. Here the oldest turns go first, then the middle of the
question, and a cut answer has no eos. A system text stays in front, unless it takes more than half of the room.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ptuning.data.fit import Fitted, fit_all
from ptuning.data.formats import Record
from ptuning.errors import ConfigError
from ptuning.families import Dialogue, Template
from ptuning.messages import message

IGNORE = -100  # label of a position without loss


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens, with the official meaning.

    Args:
        max_source_length: of the prompt, [gMASK] sop included.
        max_target_length: of the answer, eos not included.
    """

    max_source_length: int
    max_target_length: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What a row lost in order to fit."""

    dropped_system: bool = False
    dropped_turns: int = 0
    cut_question: bool = False
    cut_answer: bool = False


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """`input_ids` and `labels` have the same length; `labels` is empty for a row that is only generated from.

    Args:
        prompt_length: so many of the ids are the prompt; the answer follows.
    """

    input_ids: list[int]
    labels: list[int]
    source: str
    prompt_length: int = 0
    changes: Changes = Changes()


@dataclass
class EncodingReport:
    """How many rows were changed to fit, printed before training or evaluation starts.

    Args:
        examples: file:line, what was done (a name in ptuning.messages), how often: lists, as the cache gives them back.
    """

    rows: int = 0
    dropped_systems: int = 0
    dropped_turns: int = 0
    cut_questions: int = 0
    cut_answers: int = 0
    tokens: int = 0
    longest: int = 0
    examples: list[list] = field(default_factory=list)

    def add(self, row: EncodedRow) -> None:
        """Counts a row."""
        self.rows += 1
        self.tokens += len(row.input_ids)
        self.longest = max(self.longest, len(row.input_ids))
        self.dropped_systems += row.changes.dropped_system
        self.dropped_turns += row.changes.dropped_turns > 0
        self.cut_questions += row.changes.cut_question
        self.cut_answers += row.changes.cut_answer
        self.note_all(row.source, row.changes)

    def note_all(self, source: str, changes: Changes) -> None:
        """Names a row that was changed, as long as there are few.

        Args:
            source: file:line of its record.
        """
        for count, what in (
            (changes.dropped_system, "dropped_system"),
            (changes.dropped_turns, "dropped_old_turns"),
            (changes.cut_question, "cut_question"),
            (changes.cut_answer, "cut_answer"),
        ):
            if count:
                self.note(source, what, int(count))

    def note(self, source: str, what: str, count: int = 1) -> None:
        if len(self.examples) < 3:
            self.examples.append([source, what, count])

    def __str__(self) -> str:
        mean = self.tokens / max(self.rows, 1)
        parts = [message("lengths", rows=self.rows, mean=mean, longest=self.longest)]
        for what in ("dropped_systems", "dropped_turns", "cut_questions", "cut_answers"):
            if count := getattr(self, what):
                parts.append(message(what, count=count))
        rows = [message("changed_row", source=at, change=message(what, count=n)) for at, what, n in self.examples]
        return message("then").join(parts) + (message("changed_rows", rows=message("and").join(rows)) if rows else "")


class Encoder:
    """Turns records into rows of ids.

    Args:
        template: of the base's family.
        lengths: limits in tokens.
        source_prefix: text put in front of every prompt.
        loss_on: "last" puts loss on the record's response, "all" also on the answers in its history. No end token follows
            those, because the official format has none between turns.

    Raises:
        ConfigError: a limit that no prompt or no answer fits into.
    """

    def __init__(self, template: Template, lengths: Lengths, source_prefix: str = "", loss_on: str = "last"):
        self.template, self.lengths, self.source_prefix, self.loss_on = template, lengths, source_prefix, loss_on
        self._end_id = template.end_id  # asked of transformers once: that takes longer than encoding a short text
        (empty,) = template.encode([template.render(Dialogue("", source_prefix=source_prefix))])
        shortest = len(empty.ids)
        if lengths.max_source_length < shortest:
            raise ConfigError(
                f"max_source_length {lengths.max_source_length} is shorter than the prompt template itself "
                f"({shortest} tokens); use at least {shortest + 16}"
            )
        if lengths.max_target_length < 1:
            raise ConfigError(f"max_target_length is {lengths.max_target_length}; use at least 1")

    def training_rows(self, records: Iterable[Record]) -> tuple[list[EncodedRow], EncodingReport]:
        """Prompt + answer + end token with labels. Records must have a response."""
        records, report = list(records), EncodingReport()
        rows = []
        for record, prompt, (answer, cut) in zip(records, self._prompts(records), self._answers(records), strict=True):
            ids, labels = prompt.ids + answer, self._labels(prompt) + answer
            rows.append(EncodedRow(ids, labels, record.source, len(prompt.ids), _changes(prompt, cut)))
            report.add(rows[-1])
        return rows, report

    def prompt_rows(self, records: Iterable[Record]) -> tuple[list[EncodedRow], EncodingReport]:
        """Prompts alone, to generate from."""
        records, report = list(records), EncodingReport()
        rows = []
        for record, prompt in zip(records, self._prompts(records), strict=True):
            rows.append(EncodedRow(prompt.ids, [], record.source, len(prompt.ids), _changes(prompt)))
            report.add(rows[-1])
        return rows, report

    def measure(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        """Tokens of each record's whole prompt and answer, before anything is cut; the end token is not counted."""
        dialogues = [Dialogue(r.prompt, r.history, r.system, self.source_prefix) for r in records]
        prompts = self.template.encode([self.template.render(dialogue) for dialogue in dialogues])
        answers = self.template.answer_ids([record.response or "" for record in records])
        return [(len(prompt.ids), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]

    def _prompts(self, records: Sequence[Record]) -> list[Fitted]:
        dialogues = [record.dialogue(self.source_prefix) for record in records]
        return fit_all(self.template, dialogues, self.lengths.max_source_length)

    def _answers(self, records: Sequence[Record]) -> Iterable[tuple[list[int], bool]]:
        """Ids of each answer, and whether it was cut; a cut one has no end token."""
        limit = self.lengths.max_target_length
        # What is longer in characters is cut anyway; the rest keeps the cut away from the tokens that stay.
        longest_text = (limit + 100) * self.template.longest_token
        texts = [  # what isn't cut stays the object that it is: a slice of a turn has lost its parts
            text if len(text := record.response) <= longest_text else text[:longest_text]
            for record in records
            if record.response is not None
        ]
        for ids in self.template.answer_ids(texts):
            yield (ids[:limit], True) if len(ids) > limit else ([*ids, self._end_id], False)

    def _labels(self, prompt: Fitted) -> list[int]:
        if self.loss_on == "last":
            return [IGNORE] * len(prompt.ids)
        inside = self.template.answer_mask(prompt.encoded)
        return [token if answer else IGNORE for token, answer in zip(prompt.ids, inside, strict=True)]


def _changes(prompt: Fitted, cut_answer: bool = False) -> Changes:
    return Changes(prompt.dropped_system, prompt.dropped_turns, prompt.cut_question, cut_answer)
