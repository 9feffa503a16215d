"""ChatGLM2's prompt template: the one that training, evaluation, serving and `apply_chat_template` share.

Source: THUDM/chatglm2-6b `tokenization_chatglm.py`, `build_prompt`.
"""

from collections.abc import Sequence
from functools import cached_property

from ptuning.families.pieces import PieceTemplate
from ptuning.families.template import Dialogue, Segment


def _opening(number: int) -> str:
    return f"[Round {number}]\n\n问："


def prompt_segments(dialogue: Dialogue) -> list[Segment]:
    """`[Round i]\\n\\n问：Q\\n\\n答：A\\n\\n` for each past turn, then the open round that the model answers.

    A system text stands in front of everything; ChatGLM2 has no role of its own for it.
    """
    segments = [Segment(dialogue.source_prefix)]
    if dialogue.system:
        segments += [Segment(dialogue.system, role="system"), Segment("\n\n")]
    for number, (question, answer) in enumerate(dialogue.history, start=1):
        segments += [Segment(_opening(number)), Segment(question, role="user"), Segment("\n\n答：")]
        segments += [Segment(answer, role="assistant", is_answer=True), Segment("\n\n")]
    newest = Segment(_opening(len(dialogue.history) + 1))
    return [*segments, newest, Segment(dialogue.prompt, role="user"), Segment("\n\n答：")]


def build_prompt(query: str, history: Sequence[tuple[str, str]] = (), system: str = "") -> str:
    """The prompt as text; arguments as in Dialogue."""
    return "".join(segment.text for segment in prompt_segments(Dialogue(query, tuple(history), system)))


class ChatGLM2Template(PieceTemplate):
    """The joined text of a prompt is tokenised at once, as the official code does; the answer by itself."""

    name = "chatglm2"
    route = "/chatglm"
    trained_length = 8192

    def render(self, dialogue: Dialogue) -> list[Segment]:
        segments = [Segment(ids=self.begin_ids), *prompt_segments(dialogue)]
        if dialogue.response is not None:
            segments.append(Segment(dialogue.response, role="assistant", is_answer=True, apart=True))
        return segments

    def stop_texts(self, dialogue: Dialogue) -> tuple[str, ...]:
        return ("\n\n" + _opening(len(dialogue.history) + 2),)

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.prefix_ids())
