"""GLM-130B has no dialogues: a prompt is text in front of [gMASK] sop, an answer what it goes on with.

Source: THUDM/GLM-130B `generate.py`; earlier turns, which the official code has none of, stand as lines in front.
"""

from typing import ClassVar

from ptuning.families.glm130b.config import LONG_MASK, MASK, SHORT_MASK
from ptuning.families.pieces import PieceTemplate
from ptuning.families.template import Blanks, Dialogue, Segment


class GLM130BTemplate(PieceTemplate):
    """System text, questions and answers line by line, then [gMASK] sop and the answer, which eop ends."""

    name = "glm130b"
    trained_length = 2048
    blanks: ClassVar[Blanks] = Blanks((MASK, SHORT_MASK, LONG_MASK), "sop", "eos")

    @property
    def begin_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def end_id(self) -> int:
        return self.stop_ids[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        tokens = self.tokenizer.tokens
        return tuple(tokens[name] for name in ("eop", "eos") if name in tokens)

    def render(self, dialogue: Dialogue) -> list[Segment]:
        segments = []
        if before := dialogue.source_prefix + (dialogue.system or ""):
            segments.append(Segment(before + "\n" * bool(dialogue.system), role="system"))
        for question, answer in dialogue.history:
            segments += [
                Segment(question + "\n", role="user"),
                Segment(answer + "\n", role="assistant", is_answer=True),
            ]
        segments.append(Segment(dialogue.prompt, role="user"))
        segments.append(Segment(ids=(self.tokenizer.tokens[LONG_MASK], self.tokenizer.tokens["sop"])))
        if dialogue.response is not None:
            segments.append(Segment(dialogue.response, role="assistant", is_answer=True, apart=True))
        return segments
