"""ChatGLM2's tokenizer on sentencepiece itself: the ids, special tokens and files of the official one.

Source: THUDM/chatglm2-6b `tokenization_chatglm.py`. The difference: text never turns into a control token, whatever it spells.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

from ptuning.errors import DataError
from ptuning.families.chatglm2.template import build_prompt
from ptuning.families.template import dialogue_of

# Their ids follow the last sentencepiece piece, in this order.
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

_SAVED_CONFIG = {
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


class _Piece(str):
    """A token's text with its id: text that merely spells a control token keeps its own ids."""

    __slots__ = ("id",)
    id: int

    @classmethod
    def make(cls, text: str, id: int) -> "_Piece":
        piece = cls(text)
        piece.id = id
        return piece


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Reads `tokenizer.model`. Pads on the left with 0, ends with 2 (`</s>`), begins a sequence with [gMASK] sop.

    Args:
        vocab_file: path of `tokenizer.model`.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file: str, padding_side: str = "left", **kwargs):
        self.vocab_file = str(vocab_file)
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        n_pieces = self.sp_model.get_piece_size()
        self.control_ids = {token: n_pieces + i for i, token in enumerate(CONTROL_TOKENS)}
        special = {"<unk>": 0, "<s>": 1, "</s>": 2} | self.control_ids
        self._added_tokens_decoder = {i: AddedToken(t, special=True, normalized=False) for t, i in special.items()}
        for fixed in ("unk_token", "bos_token", "eos_token", "pad_token", "additional_special_tokens"):
            kwargs.pop(fixed, None)
        kwargs |= {"extra_special_tokens": list(CONTROL_TOKENS), "clean_up_tokenization_spaces": False}
        super().__init__(
            padding_side=padding_side,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unk>",
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Pieces and control tokens."""
        return self.sp_model.get_piece_size() + len(CONTROL_TOKENS)

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.get_piece_size())}
        return pieces | self.control_ids

    def __len__(self) -> int:
        return self.vocab_size

    def prefix_ids(self) -> list[int]:
        """What every sequence begins with: [gMASK] sop."""
        return [self.control_ids["[gMASK]"], self.control_ids["sop"]]

    def encode_text(self, text: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Ids of plain text, or of many texts at once, without [gMASK] sop: the fast way for data sets."""
        return self.sp_model.encode(text if isinstance(text, str) else list(text))

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return [_Piece.make(self.sp_model.id_to_piece(i), i) for i in self.sp_model.encode(text)]

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        if isinstance(token, _Piece):
            return token.id
        return super()._convert_token_to_id_with_added_voc(token)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # Ids up to padded_vocab_size have an embedding but no piece; a model may still produce one.
        return self.sp_model.id_to_piece(index) if 0 <= index < self.sp_model.get_piece_size() else "<unk>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        hidden = set(self.all_special_tokens)
        return self.sp_model.decode_pieces([str(t) for t in tokens if t not in hidden])

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        """Text of the ids. As in the official tokenizer control tokens leave no text, with either setting."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        return self.sp_model.decode([i for i in ids if 2 < i < self.sp_model.get_piece_size()])

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
        """The official method of this name; see ptuning.families.chatglm2.template."""
        return build_prompt(query, history or ())

    def apply_chat_template(  # the base class's Jinja templates can't keep text and control tokens apart
        self,
        conversation: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_dict: bool = False,
        **kwargs,
    ) -> Any:
        """Messages → the same ids as `build_prompt` with a history.

        Args:
            conversation: messages with role system (first only), user, assistant in turn; or a list of such.
            tokenize: False returns the text.
            add_generation_prompt: kept for the interface; an open last round always ends in `答：`, and a conversation
                that ends with the assistant gets its answer and </s> (what training sees).
            return_dict: return input_ids, attention_mask and position_ids instead of the ids alone.
            **kwargs: padding, max_length, return_tensors as in `__call__`.

        Raises:
            DataError: messages that aren't such a dialogue, or truncation is asked for.
        """
        if kwargs.get("truncation"):
            raise DataError("truncation would cut off the end of the question and 答：; leave out old messages instead")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        several: Sequence[Any] = conversation if batched else [conversation]
        dialogues = [dialogue_of(messages) for messages in several]
        prompts = [build_prompt(each.prompt, each.history, each.system or "") for each in dialogues]
        answers = [each.response for each in dialogues]
        if not tokenize:
            texts = [prompt + (answer or "") for prompt, answer in zip(prompts, answers, strict=True)]
            return texts if batched else texts[0]
        rows = [self.prefix_ids() + self.encode_text(prompt) for prompt in prompts]
        for row, answer in zip(rows, answers, strict=True):
            if answer is not None:
                row += [*self.encode_text(answer), self.eos_token_id]
        kwargs = {key: value for key, value in kwargs.items() if key in ("padding", "max_length", "return_tensors")}
        kwargs.setdefault("padding", False)
        encoded = self.pad({"input_ids": rows if batched or kwargs.get("return_tensors") else rows[0]}, **kwargs)
        return encoded if return_dict else encoded["input_ids"]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> tuple[str, ...]:
        """Writes tokenizer.model and the official tokenizer_config.json: the official class can't read a longer one."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(_SAVED_CONFIG, indent=2) + "\n", encoding="utf-8")
        return (str(config), *self.save_vocabulary(str(folder)))
