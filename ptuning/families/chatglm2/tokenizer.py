"""ChatGLM2's tokenizer on sentencepiece itself: the ids, special tokens and files of the official one.

Source: THUDM/chatglm2-6b `tokenization_chatglm.py`. The difference: text never turns into a control token, whatever it spells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import sentencepiece

from ptuning.families.chatglm2.template import ChatGLM2Template, build_prompt
from ptuning.families.chatglm2.versions import Version, version_in
from ptuning.families.pieces import PieceTokenizer
from ptuning.families.template import Dialogue, Template

# Their ids follow the last sentencepiece piece, in this order.
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class ChatGLMTokenizer(PieceTokenizer):
    """Reads `tokenizer.model`. Pads on the left with 0, ends with 2 (`</s>`), begins a sequence with [gMASK] sop.

    Official files of ChatGLM3 name the same class; in a folder of one it is that subclass which is made.

    Args:
        vocab_file: path of `tokenizer.model`.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]
    saved_config: ClassVar[dict[str, Any]] = {
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }

    version: ClassVar[Version] = "chatglm2"
    control_tokens: ClassVar[tuple[str, ...]] = CONTROL_TOKENS

    def __new__(cls, vocab_file: str | None = None, *args: Any, **kwargs: Any) -> Self:
        made: Any = cls
        if cls is ChatGLMTokenizer and vocab_file is not None:  # None: a copy is made
            version = version_in(Path(vocab_file).parent)
            made = next((each for each in ChatGLMTokenizer.__subclasses__() if each.version == version), cls)
        return super().__new__(made)

    def __init__(self, vocab_file: str, padding_side: str = "left", **kwargs: Any):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        first = processor.get_piece_size()
        controls = {token: first + i for i, token in enumerate(self.control_tokens)}
        super().__init__(vocab_file, processor, controls, padding_side, **kwargs)

    def template(self) -> Template:
        return ChatGLM2Template(self)

    def prompt_text(self, dialogue: Dialogue) -> str:
        return build_prompt(dialogue.prompt, dialogue.history, dialogue.system or "")

    def prefix_ids(self) -> list[int]:
        """What every sequence begins with: [gMASK] sop."""
        return [self.control_ids["[gMASK]"], self.control_ids["sop"]]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """[gMASK] sop A, or [gMASK] sop A B </s> as the official tokenizer does for pairs."""
        ids = self.prefix_ids() + list(token_ids_0)
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.eos_token_id]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens: bool = False):
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        return [1, 1] + [0] * len(token_ids_0) + ([] if token_ids_1 is None else [0] * len(token_ids_1) + [1])

    def _pad(self, encoded_inputs, *args, **kwargs):
        """Adds `position_ids` that count real tokens from 0, as the official tokenizer does, before padding."""
        length = len(encoded_inputs["input_ids"])
        encoded_inputs = super()._pad(encoded_inputs, *args, **kwargs)
        padded = len(encoded_inputs["input_ids"]) - length
        positions = encoded_inputs.get("position_ids", list(range(length)))
        if len(positions) < length + padded:
            fill = [0] * padded
            positions = fill + positions if self.padding_side == "left" else positions + fill
        encoded_inputs["position_ids"] = positions
        return encoded_inputs

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """The official method of this name: a question after earlier turns, as text."""
        return self.prompt_text(Dialogue(query, tuple(history or ())))
