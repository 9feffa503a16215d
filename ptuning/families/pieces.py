"""What families share whose tokenizer is SentencePiece: the tokenizer over `tokenizer.model`, and what a template asks of it.

Text never turns into a control token, whatever it spells.
"""

import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

from ptuning.errors import ConfigError, DataError
from ptuning.families.template import Dialogue, Template, dialogue_of


class _Piece(str):
    """A token's text with its id: text that merely spells a control token keeps its own ids."""

    __slots__ = ("id",)
    id: int

    @classmethod
    def make(cls, text: str, id: int) -> "_Piece":
        piece = cls(text)
        piece.id = id
        return piece


class PieceTokenizer(PreTrainedTokenizer):
    """Reads `tokenizer.model`. `<unk>` is its first piece and fills rows, `<s>` the second, `</s>` the third. Pads on the left.

    Args:
        vocab_file: path of `tokenizer.model`.
        processor: of that file.
        control_ids: the family's own control tokens, among the pieces or behind them.
        first_id: of the pieces.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    saved_config: ClassVar[dict[str, Any]]  # tokenizer_config.json as it is written

    def __init__(
        self,
        vocab_file: str,
        processor: sentencepiece.SentencePieceProcessor,
        control_ids: Mapping[str, int],
        padding_side: str = "left",
        first_id: int = 0,
        **kwargs: Any,
    ):
        self.vocab_file, self.sp_model, self.control_ids = str(vocab_file), processor, dict(control_ids)
        self.first_id = first_id
        special = {"<unk>": first_id, "<s>": first_id + 1, "</s>": first_id + 2} | self.control_ids
        self._added_tokens_decoder = {i: AddedToken(t, special=True, normalized=False) for t, i in special.items()}
        for fixed in ("unk_token", "bos_token", "eos_token", "pad_token", "additional_special_tokens"):
            kwargs.pop(fixed, None)
        kwargs |= {"extra_special_tokens": list(self.control_ids), "clean_up_tokenization_spaces": False}
        super().__init__(
            padding_side=padding_side,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unk>",
            **kwargs,
        )

    @abstractmethod
    def template(self) -> Template:
        """The family's template over this tokenizer."""

    @abstractmethod
    def prompt_text(self, dialogue: Dialogue) -> str:
        """The dialogue without its response, as text."""

    def spelled(self, dialogue: Dialogue, names: Mapping[int, str]) -> str:
        """The dialogue without its response, control tokens by these names."""
        segments = self.template().render(Dialogue(dialogue.prompt, dialogue.history, dialogue.system))
        return "".join(each.text or "".join(names[token] for token in each.ids) for each in segments)

    @property
    def vocab_size(self) -> int:
        """Pieces and control tokens."""
        return max(self.sp_model.get_piece_size(), *(i + 1 for i in self.control_ids.values()))

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.get_piece_size())}
        return pieces | self.control_ids

    def __len__(self) -> int:
        return self.vocab_size

    def encode_text(self, text: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Ids of plain text, or of many texts at once, without any begin token: the fast way for data sets."""
        return self.sp_model.encode(text if isinstance(text, str) else list(text))

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [_Piece.make(self.sp_model.id_to_piece(i), i) for i in self.sp_model.encode(text)]

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        if isinstance(token, _Piece):
            return token.id
        return super()._convert_token_to_id_with_added_voc(token)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # Ids up to the model's vocabulary have an embedding but no piece; a model may still produce one.
        return self.sp_model.id_to_piece(index) if 0 <= index < self.sp_model.get_piece_size() else "<unk>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        hidden = set(self.all_special_tokens)
        return self.sp_model.decode_pieces([str(t) for t in tokens if t not in hidden])

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Text of the ids. Control tokens leave no text, with either setting."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        pieces, hidden = self.sp_model.get_piece_size(), set(self.control_ids.values())
        return self.sp_model.decode([i for i in ids if self.first_id + 2 < i < pieces and i not in hidden])

    def apply_chat_template(  # the base class's Jinja templates can't keep text and control tokens apart
        self,
        conversation: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Messages → the ids that training and serving have.

        Args:
            conversation: messages with role system (first only), user, assistant in turn; or a list of such.
            tokenize: False returns the text.
            add_generation_prompt: kept for the interface; an open last round always ends where the answer begins, and a
                conversation that ends with the assistant gets its answer and </s> (what training sees).
            return_dict: return input_ids, attention_mask, … instead of the ids alone.
            **kwargs: padding, max_length, return_tensors as in `__call__`.

        Raises:
            DataError: messages that aren't such a dialogue, or truncation is asked for.
        """
        if kwargs.get("truncation"):
            raise DataError("truncation would cut off where the answer begins; leave out old messages instead")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        several: Sequence[Any] = conversation if batched else [conversation]
        dialogues = [dialogue_of(messages) for messages in several]
        if not tokenize:
            texts = [self.prompt_text(dialogue) + (dialogue.response or "") for dialogue in dialogues]
            return texts if batched else texts[0]
        template = self.template()
        rows = [encoded.ids for encoded in template.encode([template.render(dialogue) for dialogue in dialogues])]
        for row, dialogue in zip(rows, dialogues, strict=True):
            if dialogue.response is not None:
                row.append(template.end_id)
        kwargs = {key: value for key, value in kwargs.items() if key in ("padding", "max_length", "return_tensors")}
        kwargs.setdefault("padding", False)
        found = self.pad({"input_ids": rows if batched or kwargs.get("return_tensors") else rows[0]}, **kwargs)
        return found if return_dict else found["input_ids"]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Writes tokenizer.model and the official tokenizer_config.json: the official class can't read a longer one."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(self.saved_config, indent=2) + "\n", encoding="utf-8")
        return (str(config), *self.save_vocabulary(str(folder)))


class PieceTemplate(Template):
    """A template over a PieceTokenizer."""

    tokenizer: PieceTokenizer

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.sp_model.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def token_bytes(self, token: int) -> bytes:
        pieces = self.tokenizer.sp_model
        names = {i: text for text, i in self.tokenizer.control_ids.items()}
        if token in names or token >= pieces.get_piece_size():
            return names.get(token, "<unk>").encode()
        piece = pieces.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if pieces.is_byte(token) else piece.replace("▁", " ").encode()

    @cached_property
    def longest_token(self) -> int:
        pieces = self.tokenizer.sp_model
        return max(len(pieces.id_to_piece(i)) for i in range(pieces.get_piece_size()))

    def token_spans(self, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
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
