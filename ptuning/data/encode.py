"""Records → token ids and labels, exactly as the official scripts encode what fits, and without their traps where it doesn't.

Source: THUDM/ChatGLM2-6B `ptuning/main.py`, preprocess_function_train: [gMASK] sop prompt, then the answer, then eos;
loss on the answer and eos only. The official code cuts a long prompt on the right, which removes "答：" and the newest
turn, and gives a cut answer an eos, which teaches early stops. Here the oldest turns go first, then the middle of the
question, and a cut answer has no eos. A system text stays in front, unless it takes more than half of the room.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ptuning.data.record import Record
from ptuning.errors import ConfigError
from ptuning.families.chatglm2.template import build_prompt
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer

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
class EncodedRow:
    """`input_ids` and `labels` have the same length; `labels` is empty for a row that is only generated from."""

    input_ids: list[int]
    labels: list[int]
    source: str


@dataclass
class EncodingReport:
    """How many rows were changed to fit, printed before training or evaluation starts."""

    rows: int = 0
    dropped_systems: int = 0
    dropped_turns: int = 0
    cut_questions: int = 0
    cut_answers: int = 0
    tokens: int = 0
    longest: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, source: str, what: str) -> None:
        if len(self.examples) < 3:
            self.examples.append(f"{source} ({what})")

    def __str__(self) -> str:
        parts = [f"{self.rows} rows, {self.tokens / max(self.rows, 1):.0f} tokens on average, longest {self.longest}"]
        for count, what in (
            (self.dropped_systems, "rows lost their system text (more than half of max_source_length)"),
            (self.dropped_turns, "rows lost old turns"),
            (self.cut_questions, "questions cut in the middle"),
            (self.cut_answers, "answers cut (no end token)"),
        ):
            if count:
                parts.append(f"{count} {what}")
        text = "; ".join(parts)
        return text + (f", e.g. {', '.join(self.examples)}" if self.examples else "")


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: list[int]
    text: str
    history: tuple[tuple[str, str], ...]  # what is left of it in the text
    start: int  # of the first round in the text


class Encoder:
    """Turns records into rows of ids.

    Args:
        tokenizer: the base model's.
        lengths: limits in tokens.
        source_prefix: text put in front of every prompt, before `[Round 1]`.
        loss_on: "last" puts loss on the record's response, "all" also on the answers in its history.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, lengths: Lengths, source_prefix: str = "", loss_on: str = "last"):
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.source_prefix = source_prefix
        self.loss_on = loss_on
        self._begin = tokenizer.prefix_ids()
        self._shortest = len(self._ids("", ()))
        if lengths.max_source_length < self._shortest:
            raise ConfigError(
                f"max_source_length {lengths.max_source_length} is shorter than the prompt template itself "
                f"({self._shortest} tokens); use at least {self._shortest + 16}"
            )
        if lengths.max_target_length < 1:
            raise ConfigError(f"max_target_length is {lengths.max_target_length}; use at least 1")

    def training_rows(self, records: Iterable[Record]) -> tuple[list[EncodedRow], EncodingReport]:
        """Prompt + answer + eos with labels. Records must have a response."""
        records, report = list(records), EncodingReport()
        prompts = self._prompts(records, report)
        answers = self.tokenizer.encode_text([record.response for record in records])
        rows = []
        for record, prompt, answer in zip(records, prompts, answers, strict=True):
            labels = self._history_labels(prompt) if self.loss_on == "all" else [IGNORE] * len(prompt.ids)
            if len(answer) > self.lengths.max_target_length:
                answer = answer[: self.lengths.max_target_length]
                report.cut_answers += 1
                report.note(record.source, "answer cut")
            else:
                answer = [*answer, self.tokenizer.eos_token_id]
            rows.append(EncodedRow(prompt.ids + answer, labels + answer, record.source))
        return rows, _count(rows, report)

    def prompt_rows(self, records: Iterable[Record]) -> tuple[list[EncodedRow], EncodingReport]:
        """Prompts alone, to generate from."""
        records, report = list(records), EncodingReport()
        prompts = self._prompts(records, report)
        rows = [EncodedRow(prompt.ids, [], record.source) for record, prompt in zip(records, prompts, strict=True)]
        return rows, _count(rows, report)

    def measure(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        """Tokens of each record's whole prompt and answer, before anything is cut; the end token is not counted."""
        texts = [self._text(record.prompt, record.history, record.system) for record in records]
        prompts = self.tokenizer.encode_text(texts)
        answers = self.tokenizer.encode_text([record.response or "" for record in records])
        begin = len(self._begin)
        return [(begin + len(prompt), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]

    def _prompts(self, records: list[Record], report: EncodingReport) -> list[_Prompt]:
        texts = [self._text(record.prompt, record.history, record.system) for record in records]
        encoded = self.tokenizer.encode_text(texts)
        limit = self.lengths.max_source_length - len(self._begin)
        return [
            self._prompt(self._begin + ids, text, record.history, record.system)
            if len(ids) <= limit
            else self._fit(record, report)
            for record, text, ids in zip(records, texts, encoded, strict=True)
        ]

    def _fit(self, record: Record, report: EncodingReport) -> _Prompt:
        history, system, limit = record.history, record.system, self.lengths.max_source_length
        if system and 2 * (len(self._ids("", (), system)) - self._shortest) > limit - self._shortest:
            system = None
            report.dropped_systems += 1
            report.note(record.source, "system text dropped")
        while history and len(self._ids(record.prompt, history, system)) > limit:
            history = history[1:]
        if len(history) < len(record.history):
            report.dropped_turns += 1
            report.note(record.source, f"{len(record.history) - len(history)} old turns dropped")
        question = record.prompt
        if len(self._ids(question, history, system)) > limit:
            question = self._cut_middle(question, system, limit)
            report.cut_questions += 1
            report.note(record.source, "question cut")
        text = self._text(question, history, system)
        return self._prompt(self._ids(question, history, system), text, history, system)

    def _cut_middle(self, question: str, system: str | None, limit: int) -> str:
        """The longest head + tail of the question that fits. Length grows with the characters kept, nearly always; the
        last loop settles the rare exception."""

        def keep(n: int) -> str:
            return question[: (n + 1) // 2] + question[len(question) - n // 2 :]

        low, high = 0, len(question)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._ids(keep(middle), (), system)) <= limit:
                low = middle
            else:
                high = middle - 1
        while low and len(self._ids(keep(low), (), system)) > limit:
            low -= 1
        return keep(low)

    def _text(self, question: str, history: tuple, system: str | None = None) -> str:
        return self.source_prefix + build_prompt(question, history, system or "")

    def _ids(self, question: str, history: tuple, system: str | None = None) -> list[int]:
        return self._begin + self.tokenizer.encode_text(self._text(question, history, system))

    def _prompt(self, ids: list[int], text: str, history: tuple, system: str | None) -> _Prompt:
        start = len(self.source_prefix) + (len(f"{system}\n\n") if system else 0)
        return _Prompt(ids, text, history, start)

    def _history_labels(self, prompt: _Prompt) -> list[int]:
        """Labels on the tokens that lie wholly inside an answer of the history. No end token follows those answers,
        because the official format has none between turns."""
        spans, at, text = [], prompt.start, prompt.text
        for i, (question, answer) in enumerate(prompt.history, start=1):
            start = at + len(f"[Round {i}]\n\n问：{question}\n\n答：")
            spans.append((len(text[:start].encode()), len(text[: start + len(answer)].encode())))
            at = start + len(answer) + len("\n\n")
        labels, n_begin = [IGNORE] * len(prompt.ids), len(self._begin)
        for index, (begin, end) in enumerate(self._byte_spans(prompt.ids[n_begin:], text), start=n_begin):
            if any(start <= begin and end <= stop and begin < end for start, stop in spans):
                labels[index] = prompt.ids[index]
        return labels

    def _byte_spans(self, ids: list[int], text: str) -> list[tuple[int, int]]:
        spans, at = [], 0
        for index, piece in enumerate(self.tokenizer.sp_model.id_to_piece(list(ids))):
            is_byte = len(piece) == 6 and piece.startswith("<0x")
            surface = piece.replace("▁", " ")
            if index == 0:
                surface = surface.removeprefix(" ")  # the dummy prefix stands for no text, also before a real space
            width = 1 if is_byte else len(surface.encode())
            spans.append((at, at + width))
            at += width
        if at != len(text.encode()):
            raise ConfigError(
                "loss_on=all needs a tokenizer that keeps the text as it is, and this one normalises it; use loss_on=last"
            )
        return spans


def _count(rows: list[EncodedRow], report: EncodingReport) -> EncodingReport:
    lengths = [len(row.input_ids) for row in rows]
    report.rows, report.tokens, report.longest = len(rows), sum(lengths), max(lengths, default=0)
    return report
