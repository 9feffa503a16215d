"""Baichuan's prompt template, by ids: who speaks is a token before what is said.

Source: baichuan-inc/Baichuan2-13B-Chat `generation_utils.py`, `build_chat_input`; Baichuan-13B-Chat `modeling_baichuan.py`,
`_build_chat_input`, which closes an earlier answer with </s>.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from ptuning.families.pieces import PieceTemplate
from ptuning.families.template import Dialogue, Segment

USER, ASSISTANT = 195, 196  # user_token_id and assistant_token_id of every generation_config.json
# Reserved name of the user's token → whether an earlier answer is closed with </s>. The assistant's is the next name.
VERSIONS = {"<reserved_102>": True, "<reserved_106>": False}


class BaichuanTemplate(PieceTemplate):
    """System text, then USER question ASSISTANT answer for each turn; each text is tokenised by itself."""

    name = "baichuan"
    route = "/baichuan"
    begin_ids = ()  # no <s>
    sampling: ClassVar[Mapping[str, Any]] = {
        "temperature": 0.3,
        "top_p": 0.85,
        "top_k": 5,
        "repetition_penalty": 1.05,
    }  # of generation_config.json

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """</s>; a model that goes on with the user's turn has ended its own."""
        return (self.end_id, USER)

    def render(self, dialogue: Dialogue) -> list[Segment]:
        segments = []
        if before := dialogue.source_prefix + (dialogue.system or ""):
            segments.append(Segment(before, role="system", apart=True))
        close = [Segment(ids=(self.end_id,))] if self.tokenizer.closes_answers else []
        for question, answer in dialogue.history:
            segments += [*_asked(question), Segment(answer, role="assistant", is_answer=True, apart=True), *close]
        segments += _asked(dialogue.prompt)
        if dialogue.response is not None:
            segments.append(Segment(dialogue.response, role="assistant", is_answer=True, apart=True))
        return segments

    def shortened(self, question: str, count: int) -> str:
        """The official code cuts on the left."""
        return question[len(question) - count :]


def _asked(question: str) -> list[Segment]:
    return [Segment(ids=(USER,)), Segment(question, role="user", apart=True), Segment(ids=(ASSISTANT,))]
