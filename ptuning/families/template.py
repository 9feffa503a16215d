"""A dialogue as segments, and segments as ids: what every family's prompt template has in common.

A template says how a dialogue is written (`render`) and which ids begin and end it. Turning segments into ids, and telling
which of these ids an answer is made of, is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from ptuning.errors import ConfigError, DataError
from ptuning.families.turns import Offer, Part, Side, Turn

Role = Literal["", "system", "user", "assistant", "observation"]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is said, without any template.

    Args:
        prompt: the newest question.
        history: past (question, answer) turns, oldest first.
        system: text in front of the first turn.
        source_prefix: text that a tuned model was trained to see in front of everything.
        response: the answer to the newest question; None where it is still to be generated.
    """

    prompt: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    source_prefix: str = ""
    response: str | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a written dialogue.

    Args:
        text: as it stands in the prompt; empty where there are only ids.
        ids: tokens that no text stands for, such as [gMASK] sop.
        role: who says it; empty for the template's own words.
        is_answer: the assistant's words, on which a loss can be taken.
        apart: tokenised by itself; otherwise together with the text segments right before it.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    role: Role = ""
    is_answer: bool = False
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Blanks:
    """The names of the tokens that blank filling needs; a template's tokenizer has their ids in `tokens`.

    Args:
        kinds: of blanks, as they stand in a text, in the order in which they are filled in. The last one goes on behind the text.
        start: what is written begins behind it.
        end: stands behind a text that doesn't end with a blank.
    """

    kinds: tuple[str, ...]
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of segments.

    Args:
        ids: all of them.
        parts: the segments of each run that was tokenised at once, with the number of its ids.
    """

    ids: list[int]
    parts: tuple[tuple[tuple[Segment, ...], int], ...]


class Template(ABC):
    """How a family writes dialogues, bound to a tokenizer.

    Args:
        tokenizer: of the base model.
    """

    name: str  # written into every manifest, so that evaluation can refuse another template
    trained_length: ClassVar[int] = 4096  # tokens of context that the models' dialogues were trained with
    route: ClassVar[str] = ""  # beside "/", where deployed clients of this model post to
    # What answers are sampled with where a client says nothing, by SamplingParams' names; here ChatGLM2's chat(), openai_api.py
    sampling: ClassVar[Mapping[str, Any]] = {"temperature": 0.8, "top_p": 0.8}

    blanks: ClassVar[Blanks | None] = None  # of a model that fills them in; None: it only goes on

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @abstractmethod
    def render(self, dialogue: Dialogue) -> list[Segment]:
        """The dialogue in the template. Where it has a response, that is what comes last, tokenised as by `answer_ids`; its end
        token is not part of it."""

    @property
    @abstractmethod
    def begin_ids(self) -> tuple[int, ...]:
        """What a text begins with that is not a dialogue, such as a completion's prompt."""

    @property
    def end_id(self) -> int:
        """The token that follows a complete answer in training."""
        return self.tokenizer.eos_token_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.end_id,)

    def stop_texts(self, dialogue: Dialogue) -> tuple[str, ...]:
        """Texts that end a shown answer to the dialogue, for a model that goes on and writes the user's next turn itself:
        exactly what the template puts between the two. None where a control token stands there."""
        return ()

    def shortened(self, question: str, count: int) -> str:
        """What stays of a question that is too long: so many characters, here of its head and its tail."""
        return question[: (count + 1) // 2] + question[len(question) - count // 2 :]

    @property
    def pad_id(self) -> int:
        """Fills shorter rows of a batch."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_id

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer, control tokens included."""
        return len(self.tokenizer)

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, without any begin or end token; text never becomes a control token."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def answer_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers as the model has to write them, without the end token."""
        return self.encode_text(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for in an answer, for log probabilities; of a control token its name."""
        return self.tokenizer.convert_ids_to_tokens(token).encode()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of more than n times as many has more than n tokens."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    def token_spans(self, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
        """The bytes of `text` in UTF-8 that each of its ids stands for: (start, end) each.

        Raises:
            ConfigError: this tokenizer can't tell.
        """
        raise ConfigError(
            f"loss_on=all: the tokenizer of {self.name} doesn't say where its tokens lie; use loss_on=last"
        )

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Ids of many rows of segments; all texts are tokenised in one call."""
        runs = [_runs(row) for row in rows]
        texts = ["".join(segment.text for segment in run) for row in runs for run in row if not run[0].ids]
        found = iter(self.encode_text(texts)) if texts else iter(())
        encoded = []
        for row in runs:
            ids: list[int] = []
            parts = []
            for run in row:
                own = list(run[0].ids) or next(found)
                ids += own
                parts.append((run, len(own)))
            encoded.append(Encoded(ids, tuple(parts)))
        return encoded

    def answer_mask(self, encoded: Encoded) -> list[bool]:
        """For each id whether it lies wholly inside an answer."""
        mask, start = [], 0
        for run, count in encoded.parts:
            if not any(segment.is_answer for segment in run):
                mask += [False] * count
            elif all(segment.is_answer for segment in run):
                mask += [True] * count
            else:
                mask += self._inside_answers(encoded.ids[start : start + count], run)
            start += count
        return mask

    def _inside_answers(self, ids: Sequence[int], run: Sequence[Segment]) -> list[bool]:
        spans, at = [], 0
        for segment in run:
            end = at + len(segment.text.encode())
            if segment.is_answer:
                spans.append((at, end))
            at = end
        inside, current = [], 0
        for begin, end in self.token_spans(ids, "".join(segment.text for segment in run)):
            while current < len(spans) and spans[current][1] < end:
                current += 1
            inside.append(begin < end and current < len(spans) and spans[current][0] <= begin)
        return inside


def _runs(segments: Sequence[Segment]) -> list[tuple[Segment, ...]]:
    """Segments that are tokenised together; empty ones are left out."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if segment.ids or segment.apart or not runs or runs[-1][0].ids or runs[-1][0].apart:
            if segment.ids or segment.text or segment.apart:
                runs.append([segment])
        elif segment.text:
            runs[-1].append(segment)
    return [tuple(run) for run in runs]


def dialogue_of(messages: Sequence[Mapping[str, Any]], source_prefix: str = "") -> Dialogue:
    """OpenAI-style messages as a dialogue; its response is None where the last turn is open.

    As in ChatGLM3's own, a system message may have `tools`, an assistant's that calls one its name as `metadata`, and
    what it returned comes from `observation` (or `tool`) in the user's place.

    Raises:
        DataError: roles that don't alternate, an unknown role, content that isn't text.
    """
    system: str | None = None
    turns: list[str] = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        where = f"messages[{index}]"
        if not isinstance(content, str):
            raise DataError(f"{where}: content is {type(content).__name__}, expected text")
        expected: Side = "user" if len(turns) % 2 == 0 else "assistant"
        if role == "system" and index == 0:
            system = Offer.of(content, message.get("tools") or ())
        elif role == expected:
            turns.append(Turn.of([Part(expected, content, message.get("metadata") or "")]))
        elif role in ("observation", "tool") and turns and expected == "user":
            turns.append(Turn.of([Part("observation", content)]))
        else:
            raise DataError(
                f"{where}: role is {role!r}, expected {expected!r} (one optional system message, then user and "
                "assistant in turn)"
            )
    if not turns:
        raise DataError("messages: no user message")
    response = turns.pop() if len(turns) % 2 == 0 else None
    history = tuple(zip(turns[0:-1:2], turns[1:-1:2], strict=True))
    return Dialogue(turns[-1], history, system or None, source_prefix, response)
