"""What the templates share in which each message is a role's token, a line for metadata, and text: ChatGLM3's and GLM-4's.

`<|role|>` metadata line break text. The metadata are empty but for a call, where they name the tool. The model writes the line
itself, so a prompt ends with `<|assistant|>`, and an answer begins with a line break or with a tool's name.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

from ptuning.families.template import Dialogue, Role, Segment, Template
from ptuning.families.turns import Offer, Part, Turn, parts_of

ROLES: tuple[Role, ...] = ("system", "user", "assistant", "observation")


class RoleTemplate(Template):
    """A template with roles, over any tokenizer that has a token for each."""

    head_apart: ClassVar[bool] = True  # the line of metadata is tokenised by itself

    @abstractmethod
    def control_id(self, token: str) -> int:
        """The id of a control token, such as `<|user|>`."""

    @abstractmethod
    def call_text(self, arguments: str) -> str:
        """How the arguments of a call are written.

        Args:
            arguments: as JSON.
        """

    def offers(self, offer: Offer) -> list[str]:
        """System texts with the tools that are offered, one message each."""
        return [str(offer)]

    @cached_property
    def role_ids(self) -> dict[Role, int]:
        """Who speaks → the token that says so."""
        return {role: self.control_id(f"<|{role}|>") for role in ROLES}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end token; a model that goes on with the user's turn, or waits for a tool, has ended its own."""
        return (self.end_id, self.role_ids["user"], self.role_ids["observation"])

    def render(self, dialogue: Dialogue) -> list[Segment]:
        segments = [Segment(ids=self.begin_ids)]
        for text in self._before(dialogue):
            segments += self._message(Part("user", text), "system")
        after_answer = False
        for question, answer in (*dialogue.history, (dialogue.prompt, None)):
            for part in parts_of(question, "user"):
                segments += self._message(part, part.role, ends_answer=after_answer)
                after_answer = False
            for part in () if answer is None else parts_of(answer, "assistant"):
                segments += self._message(part, "assistant", ends_answer=after_answer)
                after_answer = True
        segments.append(Segment(ids=(self.role_ids["assistant"],)))
        if dialogue.response is not None:
            segments += self._answer(dialogue.response)
        return segments

    def shortened(self, question: str, count: int) -> str:
        """Of what tools returned the newest, cut as a question is."""
        if not isinstance(question, Turn):
            return super().shortened(question, count)
        newest = question.parts[-1]
        return Turn.of([replace(newest, text=super().shortened(newest.text, min(count, len(newest.text))))])

    def answer_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.encode([self._answer(text) for text in texts])]

    def _before(self, dialogue: Dialogue) -> list[str]:
        """System texts."""
        system = dialogue.system or ""
        texts = self.offers(system) if isinstance(system, Offer) else [system]
        texts[0] = dialogue.source_prefix + texts[0]
        return [text for text in texts if text]

    def _message(self, part: Part, role: Role, ends_answer: bool = False) -> list[Segment]:
        """A message with its role's token. Where that ends an answer it is a part of it: what the model should say there."""
        return [Segment(ids=(self.role_ids[role],), is_answer=ends_answer), *self._line(part, role)]

    def _answer(self, response: str) -> list[Segment]:
        """What the model writes after <|assistant|>."""
        first, *others = parts_of(response, "assistant")
        segments = self._line(first, "assistant")
        for part in others:
            segments += self._message(part, "assistant", ends_answer=True)
        return segments

    def _line(self, part: Part, role: Role) -> list[Segment]:
        text = self.call_text(part.text) if part.call else part.text
        said = role == "assistant"
        return [
            Segment(f"{part.call}\n", role=role, is_answer=said, apart=self.head_apart),
            Segment(text, role=role, is_answer=said, apart=self.head_apart),
        ]
