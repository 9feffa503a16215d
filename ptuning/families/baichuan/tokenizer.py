"""Baichuan's tokenizer on sentencepiece itself: the ids, special tokens and files of the official one.

Source: baichuan-inc/Baichuan2-13B-Chat `tokenization_baichuan.py`. The difference: text never turns into one of the two tokens
that say who speaks. Their names are ordinary pieces of the file, so a user could write them.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import sentencepiece

from ptuning.errors import ModelError
from ptuning.families.baichuan.template import ASSISTANT, USER, VERSIONS, BaichuanTemplate
from ptuning.families.pieces import PieceTokenizer
from ptuning.families.template import Dialogue


class BaichuanTokenizer(PieceTokenizer):
    """Reads `tokenizer.model`. Pads on the left with 0, ends with 2 (`</s>`), begins a sequence with nothing.

    Args:
        vocab_file: path of `tokenizer.model`.
        add_bos_token: `<s>` in front of a text; no official file says so.
        add_eos_token: `</s>` behind it.

    Raises:
        ModelError: the file is another model's tokenizer.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    saved_config: ClassVar[dict[str, Any]] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "use_fast": False,
        "tokenizer_class": "BaichuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    }

    def __init__(
        self,
        vocab_file: str,
        padding_side: str = "left",
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        **kwargs: Any,
    ):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        user = processor.id_to_piece(USER) if processor.get_piece_size() > ASSISTANT else "nothing"
        if user not in VERSIONS:
            raise ModelError(
                f"{vocab_file}: piece {USER} is {user}, expected {' or '.join(VERSIONS)} (Baichuan, Baichuan2), so it is another "
                "model's tokenizer; copy tokenizer.model from the official Baichuan folder"
            )
        self.closes_answers = VERSIONS[user]
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        controls = {processor.id_to_piece(token): token for token in (USER, ASSISTANT)}
        kwargs.pop("sp_model_kwargs", None)
        super().__init__(vocab_file, _unwritable(processor, controls), controls, padding_side, **kwargs)

    def template(self) -> BaichuanTemplate:
        return BaichuanTemplate(self)

    def prompt_text(self, dialogue: Dialogue) -> str:
        """With the reserved names of the two speakers."""
        names = {token: name for name, token in self.control_ids.items()} | {self.eos_token_id: "</s>"}
        return self.spelled(dialogue, names)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """As the official tokenizer: with the settings of official files, the texts' own ids."""
        before, behind = [self.bos_token_id] * self.add_bos_token, [self.eos_token_id] * self.add_eos_token
        ids = before + list(token_ids_0) + behind
        return ids if token_ids_1 is None else ids + before + list(token_ids_1) + behind

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens: bool = False):
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        one = [
            [1] * self.add_bos_token + [0] * len(ids) + [1] * self.add_eos_token
            for ids in (token_ids_0, token_ids_1 or [])
        ]
        return one[0] if token_ids_1 is None else one[0] + one[1]


def _unwritable(
    processor: sentencepiece.SentencePieceProcessor, names: Sequence[str] | dict[str, int]
) -> sentencepiece.SentencePieceProcessor:
    """The same processor, for which no text is one of these pieces."""
    if not any(processor.piece_to_id(name) in processor.encode(name) for name in names):
        return processor
    from sentencepiece import sentencepiece_model_pb2  # here, because only these files need it

    model = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]  # made at run time
        processor.serialized_model_proto()
    )
    for piece in model.pieces:
        if piece.piece in names:
            piece.type = piece.CONTROL
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
